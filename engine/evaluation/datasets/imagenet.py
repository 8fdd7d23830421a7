"""ImageNet's validation pictures (Russakovsky et al. 2015), with a prompt and a label each.

The official files, in any of these layouts:

    val/n01440764/ILSVRC2012_val_00000293.JPEG             a folder per class, as most unpack it
    val/ILSVRC2012_val_00000001.JPEG ...                   flat, as ILSVRC2012_img_val.tar is, with
        ILSVRC2012_devkit_t12/data/{ILSVRC2012_validation_ground_truth.txt, meta.mat}, or
        LOC_val_solution.csv (ImageId, PredictionString), or a label file as of "own pictures"
    ILSVRC/Data/CLS-LOC/val/...                            flat, as the challenge page packs it

The classes come from `LOC_synset_mapping.txt` or `synset_words.txt` (`n01440764 tench, Tinca
tinca`), or from the development kit: label c is class c in the order of the WordNet numbers, as
class-conditional models have it. (The kit's own numbers, 1 to 1,000, are another order.) The prompt
is the class's synonyms as WordNet writes them, "great white shark, white shark, man-eater", its
spaces kept. Pictures come in the order of their names. No groups.
"""

from collections.abc import Iterable
from pathlib import Path

from etude.core.errors import UserError
from etude.data.class_list import ClassList
from etude.data.index import PICTURES
from etude.data.label_files import find_label_file, read_label_file
from etude.data.labelled_folders import open_folder

from . import data_set
from .items import Item, ItemDataSet, balanced, expect, first_file, read_text

COUNT, CLASSES = 50_000, 1_000
_PICTURES = ("ILSVRC/Data/CLS-LOC/val", "val", "ILSVRC2012_img_val", "validation", ".")
_LISTS = ("LOC_synset_mapping.txt", "synset_words.txt", "classes.txt")
_KITS = ("ILSVRC2012_devkit_t12/data", "data", ".")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@data_set("imagenet")
class ImageNet(ItemDataSet):
    """ImageNet's validation part: 50,000 pictures of 1,000 classes.

    Args:
        folder: holds the pictures and what says their classes, see above.
        classes: text file with a WordNet number and a name per line; by default one of the
            official names in the folder, or the development kit.
        whole: refuse another number of pictures or classes than was published.
    """

    name = "imagenet"

    def __init__(self, folder: str | Path, *, classes: str = "", whole: bool = True) -> None:
        super().__init__(folder)
        self.whole = whole
        self.root = first_file(self.folder, _PICTURES, self.name)
        kits = [self.folder / name for name in _KITS if (self.folder / name / _TRUTH).is_file()]
        self._kit = kits[0] if kits else None
        self._list = self._classes(classes)
        self.classes = tuple(self._list.names)

    def _classes(self, named: str) -> ClassList:
        lists = [self.folder / name for name in _LISTS if (self.folder / name).is_file()]
        if named or lists:
            found = ClassList.read(named or lists[0])
            order = sorted(range(len(found)), key=found.identifiers.__getitem__)
            found = ClassList(
                [found.identifiers[i] for i in order], [found.names[i] for i in order]
            )
        elif self._kit is not None:
            kit = _kit_classes(self._kit / "meta.mat")
            found = ClassList(*zip(*sorted(kit.values()), strict=True))
        else:
            raise UserError(
                f"{self.name}: {self.folder} has no {' or '.join(_LISTS)}, nor the development "
                f"kit, that names the classes; copy one there or set classes=FILE"
            )
        expect(len(found), CLASSES, self.whole, f"{self.name}: the classes")
        return found

    def read_items(self) -> Iterable[Item]:
        labels = self._labelled()
        expect(len(labels), COUNT, self.whole, f"{self.root}: the pictures")
        names = self.classes
        rows = sorted(labels.items(), key=lambda row: (row[0].rpartition("/")[2], row[0]))
        return [Item(Path(file).stem, file, names[label], label) for file, label in rows]

    def _labelled(self) -> dict[str, int]:
        """Label by picture."""
        loose = sorted(
            path.name for path in self.root.iterdir() if path.suffix[1:].lower() in PICTURES
        )
        if not loose:
            found = open_folder(f"imagenet:{self.root}", self._list)
            return dict(zip(found.files, found.labels.tolist(), strict=True))
        solution = self.folder / "LOC_val_solution.csv"
        table = solution if solution.is_file() else find_label_file(self.root, inside_only=False)
        if table is not None:
            rows = read_label_file(table, self.root, loose)
            return {file: self._label(said[0], f"{table}: {file}") for file, said in rows.items()}
        if self._kit is None:
            raise UserError(
                f"{self.root} holds pictures without class folders, and nothing says their "
                f"classes: copy {_TRUTH} and meta.mat, or LOC_val_solution.csv, to {self.folder}"
            )
        return self._from_kit(loose)

    def _from_kit(self, pictures: list[str]) -> dict[str, int]:
        """Line i of the ground truth is the kit's number of picture i."""
        truth = self._kit / _TRUTH
        lines = read_text(truth).split()
        kit = _kit_classes(self._kit / "meta.mat")
        if len(lines) != len(pictures):
            raise UserError(
                f"{truth} has {len(lines):,} lines but {self.root} {len(pictures):,} pictures; "
                f"copy both again"
            )
        found = {}
        for number, (file, line) in enumerate(zip(pictures, lines, strict=True), 1):
            if not line.isdecimal() or int(line) not in kit:
                raise UserError(f"{truth}, line {number}: {line[:20]!r} is no class of meta.mat")
            found[file] = self._label(kit[int(line)][0], f"{truth}, line {number}")
        return found

    def _label(self, said: str | int, where: str) -> int:
        place = (
            self._list.numbered(said, where)
            if isinstance(said, int)
            else self._list.place(said, where)
        )
        if place is None:
            raise UserError(f"{where}: {said} is none of the {len(self._list)} classes")
        return place


@data_set("imagenet15k")
class ImageNet15k(ImageNet):
    """14,749 of the pictures: `random.Random(0).sample` over them in the order of their names."""

    name = "imagenet15k"

    def read_items(self) -> Iterable[Item]:
        return balanced(list(super().read_items()))


def _kit_classes(path: Path) -> dict[int, tuple[str, str]]:
    """The kit's number -> (WordNet number, synonyms) of the leaves in its `meta.mat`."""
    from scipy.io import loadmat  # slow to import, and needed by this file alone

    try:
        table = loadmat(path, squeeze_me=True)["synsets"]
        rows = [[row[n] for n in ("ILSVRC2012_ID", "WNID", "words")] for row in table]
        # Numbers above 1,000 are inner nodes of the tree, which no picture has.
        found = {int(n): (str(w), str(words)) for n, w, words in rows if int(n) <= CLASSES}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy it from the development kit") from None
    except Exception as error:  # scipy raises many kinds on damaged files
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not the kit's list of classes ({reason})") from None
    return found
