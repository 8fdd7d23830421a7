"""Data sets that are lists of items, each a picture, a prompt, or both; the base of the others."""

import csv
import functools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from etude.core.errors import UserError

from ..sets import ListedPictures
from . import Prompt, Prompts, Question

T = TypeVar("T")
BALANCED = 14_749  # pictures of CC12M's part; the number that other sets are brought to


@dataclass(frozen=True)
class Item:
    """One entry of a data set.

    Attributes:
        id: unique in the data set, and stable.
        file: its picture, relative to the data set's `root`; "" for a prompt alone.
        text: its prompt; None for a picture alone.
        label: class index, -1 without.
        group: "" without.
        questions: about a picture that the prompt asked for.
    """

    id: str
    file: str = ""
    text: str | None = None
    label: int = -1
    group: str = ""
    questions: tuple[Question, ...] = ()


class ItemDataSet:
    """A data set whose items `read_items` lists; pictures and prompts come from the same list.

    Attributes:
        name: as it is registered.
        root: the folder that the items' files are relative to.
        classes: class names; label i is classes[i].
    """

    name = "items"

    def __init__(self, folder: str | Path) -> None:
        self.folder = self.root = Path(folder)
        self.classes: tuple[str, ...] = ()
        if not self.folder.is_dir():
            raise UserError(
                f"{self.name}: {self.folder} is not a folder; name the folder of its files"
            )

    @functools.cached_property
    def items(self) -> tuple[Item, ...]:
        """All items in the order of the set.

        Raises:
            UserError: files are missing, damaged or of another number, or an id is there twice.
        """
        found = tuple(self.read_items())
        twice = [one for one, count in Counter(item.id for item in found).items() if count > 1]
        if twice:
            raise UserError(f"{self.name}: {self.folder} names {twice[0]} twice; keep one of them")
        return found

    def read_items(self) -> Iterable[Item]:
        raise NotImplementedError

    def pictures(
        self, *, size: int = 0, fit: str = "crop", channels: int = 3, limit: int = 0
    ) -> ListedPictures | None:
        """Its real pictures, the first `limit` of them (0: all); None for prompts alone."""
        items = [item for item in self.items if item.file][: limit or None]
        if not items:
            return None
        return ListedPictures(
            self.root,
            [item.file for item in items],
            name=self.name,
            keys=[item.id for item in items],
            labels=[item.label for item in items],
            groups=[item.group for item in items],
            classes=self.classes,
            size=size,
            fit=fit,
            channels=channels,
        )

    def prompts(self, *, limit: int = 0) -> Prompts | None:
        """Its prompts, the first `limit` (0: all); None for pictures alone."""
        items = [item for item in self.items if item.text is not None][: limit or None]
        if not items:
            return None
        found = [Prompt(i.id, i.text, i.label, i.group, i.questions) for i in items]
        return Prompts(self.name, tuple(found), self.classes)


def balanced(rows: Sequence[T], count: int = BALANCED) -> list[T]:
    """`random.Random(0).sample(rows, count)`, in the order drawn; all of fewer rows, drawn too.

    Python keeps this function's draws fixed from version to version.
    """
    return random.Random(0).sample(list(rows), min(count, len(rows)))


def expect(found: int, official: int, whole: bool, what: str) -> None:
    """Refuses a set of another size than the published one, unless a part was asked for.

    Raises:
        UserError: `whole` is set and the numbers differ.
    """
    if whole and found != official:
        raise UserError(
            f"{what} are {found:,} instead of {official:,}: copy the files again, or set "
            f"whole=false to use what is there under a protocol of its own"
        )


def first_file(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of several paths below `folder` that exists.

    Raises:
        UserError: none does.
    """
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise UserError(f"{what}: {folder} has no {' or '.join(names)}; copy its files there")
    return found


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, a byte-order mark left out; `UserError` where it is not."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} is not UTF-8 text that can be read; copy it again") from None


def read_table(
    path: Path, columns: Sequence[str], *, delimiter: str = ",", quoted: bool = True
) -> list[dict[str, str]]:
    """The rows of a table with a header, as column -> text; a missing last cell is "".

    Args:
        columns: those that it must have.
        quoted: whether a quotation mark at the start of a cell is none of its text.

    Raises:
        UserError: it cannot be read, or a column is missing.
    """
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = read_text(path).splitlines(keepends=True)
    table = csv.DictReader(lines, delimiter=delimiter, quoting=quoting, restval="")
    missing = [name for name in columns if name not in (table.fieldnames or ())]
    if missing:
        raise UserError(
            f"{path} has no column {' or '.join(missing)} in its first line; copy it again"
        )
    try:
        return [{name: row[name] or "" for name in table.fieldnames} for row in table]
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: {error}; copy it again") from None
