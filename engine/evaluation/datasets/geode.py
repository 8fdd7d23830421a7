"""GeoDE (Ramaswamy et al. 2023): objects photographed in six regions of the world, by region.

The official files, unpacked into one folder:

    index.csv     a row per picture: file_path, object, region, and more
    images/...    the pictures, at file_path

The published set has 61,940 pictures of 40 objects. Comparisons are made over a balanced part: the
27 objects that have at least 180 pictures in every region (Hall et al. 2023, "DIG In"), the first
180 rows of each object and region in the order of the index, rows with tree_tag "yes" left out
where the index has that column. That is 27 x 6 x 180 = 29,160 pictures, objects and then regions in
alphabetical order. The prompt is "cooking pot in Southeast Asia", the label the object, the group
the region.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from etude.core.errors import UserError

from . import data_set
from .items import Item, ItemDataSet, expect, first_file, read_table

REGIONS = {
    "Africa": "Africa",
    "Americas": "the Americas",
    "EastAsia": "East Asia",
    "Europe": "Europe",
    "SouthEastAsia": "Southeast Asia",
    "WestAsia": "West Asia",
}
OBJECTS = tuple(
    "bag bicycle candle car chair cleaning_equipment cooking_pot dog dustbin front_door "
    "hairbrush_comb hand_soap hat jug light_fixture light_switch lighter medicine plate_of_food "
    "spices storefront stove toothbrush toothpaste_toothpowder toy tree waste_container".split()
)
PER_BLOCK = 180


@data_set("geode")
class GeoDe(ItemDataSet):
    """GeoDE's balanced part, 29,160 pictures.

    Args:
        folder: holds `index.csv` and `images`.
        whole: refuse an index in which an object and region has fewer pictures.
    """

    name = "geode"
    per_block = PER_BLOCK

    def __init__(self, folder: str | Path, *, whole: bool = True) -> None:
        super().__init__(folder)
        self.whole, self.classes = whole, OBJECTS
        self._index = first_file(self.folder, ["index.csv"], self.name)
        self.root = first_file(self.folder, ["images", "."], self.name)

    def read_items(self) -> Iterable[Item]:
        blocks: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in read_table(self._index, ["file_path", "object", "region"]):
            if row.get("tree_tag") != "yes":
                file = row["file_path"].lstrip("/").removeprefix("images/")
                blocks[row["object"], row["region"]].append(file)
        found = [
            Item(file, file, f"{thing.replace('_', ' ')} in {said}", label, region)
            for label, thing in enumerate(OBJECTS)
            for region, said in REGIONS.items()
            for file in self._block(blocks[thing, region], thing, region)
        ]
        if not found:
            seen = next((" in ".join(block) for block in blocks if blocks[block]), "nothing")
            raise UserError(
                f"{self._index} has no picture of the {len(OBJECTS)} objects in the "
                f"{len(REGIONS)} regions, but {seen}; copy GeoDE's own index.csv"
            )
        return found

    def _block(self, files: list[str], thing: str, region: str) -> list[str]:
        some = files[:PER_BLOCK]
        expect(len(some), PER_BLOCK, self.whole, f"{self._index}: pictures of {thing} in {region}")
        return some[: self.per_block]


@data_set("geode15k")
class GeoDe15k(GeoDe):
    """The first 90 pictures of each object and region of `geode`: 14,580."""

    name = "geode15k"
    per_block = 90
