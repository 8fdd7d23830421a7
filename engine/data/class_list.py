"""Which classes a learner tells apart, in which order; called by the readers of picture folders.

A class list is a text file with a class per line: a WordNet number and a name (`n01440764 tench`,
the form of ImageNet's own lists), another identifier, a tab and a name, or one word or name alone.
Class index c is the c-th line. A list may be part of a whole one, as those of ImageNet-100 are
(Tian et al. 2020, arXiv 1906.05849): its own order gives the indices, while numbers that a data set
publishes (ImageNet-V2's folders) count in the whole list.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from etude.core.errors import UserError
from etude.core.recipe_tree import nearest

_WNID = re.compile(r"n\d{8}")
_LINE = re.compile(r"(n\d{8})\s+(\S.*)")


class ClassList:
    """Classes in index order.

    Attributes:
        identifiers: of each class, unique: WordNet numbers for ImageNet.
        names: for people and prompts; the identifier where the list gives no name.
        whole: the list that this is a subset of, or None.
    """

    def __init__(
        self,
        identifiers: Sequence[str],
        names: Sequence[str] | None = None,
        whole: "ClassList | None" = None,
    ) -> None:
        self.identifiers = list(identifiers)
        self.names = list(identifiers if names is None else names)
        self.whole = whole
        self._index = {text: index for index, text in enumerate(self.identifiers)}
        self._named: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            self._named.setdefault(_plain(name), []).append(index)
        self._published = sorted(self.identifiers)

    def __len__(self) -> int:
        return len(self.identifiers)

    @classmethod
    def read(cls, path: str | Path) -> "ClassList":
        """The list in a text file.

        Raises:
            UserError: no such file, no line in it, or a class that stands in it twice.
        """
        rows: dict[str, tuple[int, str]] = {}
        for number, text in _lines(Path(path)):
            identifier, name = _row(text)
            if identifier in rows:
                raise UserError(
                    f"{path}, line {number}: {identifier} stands in line {rows[identifier][0]} "
                    "already; keep one of them"
                )
            rows[identifier] = number, name
        return cls(list(rows), [name for _, name in rows.values()])

    def within(self, whole: "ClassList") -> "ClassList":
        """The same classes as part of a whole list, which gives the names that this one lacks.

        Raises:
            UserError: a class that the whole list does not hold, or that stands here twice.
        """
        places: dict[int, str] = {}
        for identifier in self.identifiers:
            place = whole.find(identifier, "the whole list of classes")
            if place is None:
                raise UserError(
                    f"{identifier!r} is none of the {len(whole)} classes of the whole list"
                    f"{whole._suggest(identifier)}"
                )
            if place in places:
                raise UserError(f"{places[place]!r} and {identifier!r} are one class; keep one")
            places[place] = identifier
        own = zip(self.identifiers, self.names, places, strict=True)
        names = [name if name != text else whole.names[place] for text, name, place in own]
        return ClassList([whole.identifiers[place] for place in places], names, whole)

    def find(self, text: str, where: str) -> int | None:
        """Index of the class with this identifier or name, None when there is none.

        Raises:
            UserError: several classes have this name.
        """
        if text in self._index:
            return self._index[text]
        found = self._named.get(_plain(text), [])
        if len(found) > 1:
            raise UserError(
                f"{where}: {len(found)} classes are called {text!r}: type the identifier, "
                f"{' or '.join(self.identifiers[index] for index in found)}"
            )
        return found[0] if found else None

    def place(self, text: str, where: str) -> int | None:
        """Like `find`; None only for a class that is known but not among these.

        Known are the classes of the whole list, and every WordNet number.

        Raises:
            UserError: nothing is called so; the message gives the nearest name.
        """
        index = self.find(text, where)
        known = index is not None or _WNID.fullmatch(text) is not None
        if not known and self.whole is not None:
            known = self.whole.find(text, where) is not None
        if not known:
            raise UserError(
                f"{where}: no class is called {text!r}{(self.whole or self)._suggest(text)}"
            )
        return index

    def numbered(self, number: int, where: str) -> int | None:
        """Index of the class that a data set publishes as `number`, None outside a subset.

        Numbers count from 0 in the sorted identifiers of the whole list, as torchvision's
        ImageFolder and ImageNet-V2 do.

        Raises:
            UserError: the whole list has fewer classes.
        """
        whole = self.whole or self
        if not 0 <= number < len(whole):
            raise UserError(
                f"{where}: {number} is no class, numbers go from 0 to {len(whole) - 1} in the "
                "order of the sorted identifiers (ILSVRC2012's own IDs from 1 are another order): "
                "name the whole list of classes, or give identifiers instead of numbers"
            )
        return self._index.get(whole._published[number])

    def _suggest(self, text: str) -> str:
        near = nearest(text, [*self.identifiers, *self.names])
        return f"; the nearest is {near!r}" if near else ""


def open_classes(file: str, whole: str = "") -> ClassList | None:
    """The list that a recipe names, as part of a whole one where it names that too.

    Args:
        file: "" for no list.
    """
    if not file:
        return None
    classes = ClassList.read(file)
    return classes.within(ClassList.read(whole)) if whole else classes


def _plain(name: str) -> str:
    """Folder names have underscores where names have spaces."""
    return name.replace("_", " ").strip()


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are not empty."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError:
        raise UserError(f"{path} is not a file that can be read; name a list of classes") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; name a list with a class per line") from None
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no class; write one per line, such as: n01440764 tench")
    return lines


def _row(text: str) -> tuple[str, str]:
    """(identifier, name)."""
    if match := _LINE.fullmatch(text):
        return match[1], match[2]
    identifier, _, name = text.partition("\t")
    return identifier.strip(), name.strip() or identifier.strip()
