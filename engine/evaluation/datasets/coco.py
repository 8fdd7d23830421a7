"""COCO captions (Lin et al. 2014; Chen et al. 2015): the validation part, a prompt per picture.

The official files, unpacked into one folder:

    annotations/captions_val2014.json    {"images": [{"id", "file_name"}], "annotations": [...]}
    val2014/COCO_val2014_000000000042.jpg
    (or annotations/captions_val2017.json and val2017/000000000139.jpg)

where an annotation is {"id", "image_id", "caption"}. Pictures come in the order of their ids; the
prompt of a picture is its caption with the lowest annotation id. No labels, no groups.
"""

from collections.abc import Iterable
from pathlib import Path

from etude.core.errors import UserError
from etude.core.files import read_json

from . import data_set
from .items import Item, ItemDataSet, balanced, expect, first_file

COUNTS = {2014: 40_504, 2017: 5_000}


@data_set("coco")
class Coco(ItemDataSet):
    """COCO's validation pictures with a caption each.

    Args:
        folder: holds `annotations` and `val2014` or `val2017`.
        year: 2014 (40,504 pictures) or 2017 (5,000).
        whole: refuse another number of pictures than was published.
    """

    name = "coco"

    def __init__(self, folder: str | Path, *, year: int = 2014, whole: bool = True) -> None:
        super().__init__(folder)
        if year not in COUNTS:
            raise UserError(f"{self.name}: there is no validation part of {year}; set year=2014")
        self.year, self.whole = year, whole
        name = f"annotations/captions_val{year}.json"
        self.annotations = first_file(self.folder, [name, Path(name).name], self.name)

    def read_items(self) -> Iterable[Item]:
        content = read_json(self.annotations)
        try:
            files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            captions: dict[int, tuple[int, str]] = {}
            for row in content["annotations"]:
                place, found = int(row["image_id"]), (int(row["id"]), str(row["caption"]).strip())
                captions[place] = min(found, captions.get(place, found))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.annotations} does not hold images and annotations with captions; name the "
                f"captions, not the instances or keypoints, of COCO {self.year}"
            ) from None
        bare = sorted(set(captions) ^ set(files))
        if bare:
            kind = "no caption" if bare[0] in files else "a caption but no file name"
            raise UserError(f"{self.annotations}: picture {bare[0]} has {kind}; copy it again")
        expect(len(files), COUNTS[self.year], self.whole, f"{self.annotations}: the pictures")
        folder = f"val{self.year}"
        return [Item(str(i), f"{folder}/{files[i]}", captions[i][1]) for i in sorted(files)]


@data_set("coco15k")
class Coco15k(Coco):
    """14,749 of COCO's pictures: `random.Random(0).sample` over them in the order of their ids."""

    name = "coco15k"

    def read_items(self) -> Iterable[Item]:
        return balanced(list(super().read_items()))
