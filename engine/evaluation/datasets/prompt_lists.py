"""Lists of prompts without pictures: PartiPrompts, DrawBench and T2I-CompBench.

Each reads the file that its publisher gives; a prompt's id is its place in that file.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from etude.core.errors import UserError

from ..text_files import read_lines
from . import data_set
from .items import Item, ItemDataSet, expect, first_file, read_table

PER_CATEGORY = 300
CATEGORIES = (  # of T2I-CompBench and, the last two, T2I-CompBench++
    "color shape texture spatial non_spatial complex 3d_spatial numeracy".split()
)
_COLUMNS = {"category": "Category", "challenge": "Challenge"}


@data_set("partiprompts")
class PartiPrompts(ItemDataSet):
    """The 1,632 prompts of PartiPrompts (Yu et al. 2022), from `PartiPrompts.tsv`.

    A row is a prompt, its Category (12 of them), its Challenge (11) and a note, parted by tabs; a
    quotation mark is part of the prompt.

    Args:
        folder: holds the table.
        groups: "category", "challenge", or "" for no groups.
        whole: refuse another number of prompts.
    """

    name = "partiprompts"
    count = 1_632

    def __init__(
        self,
        folder: str | Path,
        *,
        groups: Literal["category", "challenge", ""] = "category",
        whole: bool = True,
    ) -> None:
        super().__init__(folder)
        if groups and groups not in _COLUMNS:
            raise UserError(
                f"{self.name} has no groups by {groups!r}; set groups to category or challenge"
            )
        self._group, self.whole = _COLUMNS.get(groups, ""), whole
        self._table = first_file(self.folder, ["PartiPrompts.tsv"], self.name)

    def read_items(self) -> Iterable[Item]:
        columns = ["Prompt", *_COLUMNS.values()]
        rows = read_table(self._table, columns, delimiter="\t", quoted=False)
        expect(len(rows), self.count, self.whole, f"{self._table}: the prompts")
        return [
            Item(str(i), "", row["Prompt"].strip(), group=row.get(self._group, ""))
            for i, row in enumerate(rows)
        ]


@data_set("drawbench")
class DrawBench(ItemDataSet):
    """The 200 prompts of DrawBench (Saharia et al. 2022).

    The official sheet, exported as CSV with the columns Prompts and Category (the group); or a text
    file with a prompt per line, which has no groups.

    Args:
        folder: holds one such file. One with "drawbench" in its name goes before others.
        whole: refuse another number of prompts.
    """

    name = "drawbench"
    count = 200

    def __init__(self, folder: str | Path, *, whole: bool = True) -> None:
        super().__init__(folder)
        self.whole = whole
        tables, texts = (sorted(self.folder.glob(f"*.{kind}")) for kind in ("csv", "txt"))
        named = [
            [path for path in paths if "drawbench" in path.name.lower()]
            for paths in (tables, texts)
        ]
        found = next((paths for paths in (*named, tables) if paths), [])
        if len(found) > 1:
            raise UserError(
                f"{self.name}: {self.folder} holds {found[0].name} and {found[1].name}; keep one, "
                "or name one drawbench.csv"
            )
        if not found:
            raise UserError(
                f"{self.name}: {self.folder} has no .csv of the sheet; export it there as CSV"
            )
        self._table = found[0]

    def read_items(self) -> Iterable[Item]:
        if self._table.suffix == ".csv":
            table = read_table(self._table, ["Prompts", "Category"])
            rows = [(row["Prompts"].strip(), row["Category"].strip()) for row in table]
        else:
            rows = [(line, "") for line in read_lines(self._table)]
        rows = [row for row in rows if row[0]]
        expect(len(rows), self.count, self.whole, f"{self._table}: the prompts")
        return [Item(str(i), "", text, group=group) for i, (text, group) in enumerate(rows)]


@data_set("t2icompbench")
class T2ICompBench(ItemDataSet):
    """T2I-CompBench's evaluation prompts (Huang et al. 2023): 300 for each category, the group.

    The folder `examples/dataset` of its repository, where `color_val.txt` and the like hold a
    prompt per line; a folder without such files gives every `.txt` in it, each a category. Empty
    lines are none.

    Args:
        folder: that folder, or the repository.
        whole: refuse another number of prompts in a published category.
    """

    name = "t2icompbench"

    def __init__(self, folder: str | Path, *, whole: bool = True) -> None:
        super().__init__(folder)
        self.whole = whole
        inner = self.folder / "examples" / "dataset"
        place = inner if inner.is_dir() else self.folder
        self._files = sorted(place.glob("*_val.txt")) or sorted(place.glob("*.txt"))
        if not self._files:
            raise UserError(
                f"{self.name}: {place} has no .txt files of prompts; name the folder that has"
            )

    def read_items(self) -> Iterable[Item]:
        found = []
        for path in self._files:
            category = path.stem.removesuffix("_val").replace("-", "_")
            lines = read_lines(path)
            if category in CATEGORIES:
                expect(len(lines), PER_CATEGORY, self.whole, f"{path}: the prompts")
            found += [
                Item(f"{category}/{i}", "", text, group=category) for i, text in enumerate(lines)
            ]
        return found
