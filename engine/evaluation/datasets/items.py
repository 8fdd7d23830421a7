"""Data sets that are lists of items, each a picture, a prompt, or both; the base of the others."""

import functools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from etude.core.errors import UserError

from ..sets import ListedPictures
from ..text_files import read_table, read_text
from . import Prompt, Prompts, Question

__all__ = [
    "BALANCED",
    "Item",
    "ItemDataSet",
    "balanced",
    "expect",
    "first_file",
    "read_table",
    "read_text",
]

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
        """Its real pictures, `limit` of them spread over all (0: all); None for prompts alone."""
        items = [item for item in self.items if item.file]
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
            limit=limit,
        )

    def prompts(self) -> Prompts | None:
        """Its prompts; None for pictures alone."""
        items = [item for item in self.items if item.text is not None]
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
