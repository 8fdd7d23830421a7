"""Labelled pictures in the folders in which test sets are published; called by practice/pictures.

`LAYOUTS` is the table of what is known: ImageNet (Russakovsky et al. 2015) by class folders or flat
with a file of labels, its test sets ImageNet-V2 (Recht et al. 2019), ImageNet-Sketch (Wang et al.
2019), ImageNet-R and ImageNet-A (Hendrycks et al. 2021), and ObjectNet (Barbu et al. 2019). A
folder is named as `layout:folder`, for example `imagenet-r:data/imagenet-r`.

Pictures come in the order of their sorted paths. Those of classes outside the class list are left
out and counted. ImageNet-R and -A hold 200 of the 1,000 classes, and their published accuracy takes
the largest logit among the classes present; every other layout takes it among all.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from etude.core.errors import UserError
from etude.core.recipe_tree import nearest

from .class_list import ClassList
from .index import PICTURES
from .label_files import Labels, explain, find_label_file, read_label_file, read_mapping


@dataclass(frozen=True)
class Layout:
    """How a published folder names its classes.

    Attributes:
        classes: what a class folder is called: "identifier" (WordNet number, or name), "number"
            in the sorted identifiers of the whole list, "mapped" by JSON files.
        restrict: the answer is looked for among the classes present.
        border: pixels to cut away on every side.
        pictures: folder of the class folders inside the given one, where it exists.
    """

    classes: Literal["identifier", "number", "mapped"] = "identifier"
    restrict: bool = False
    border: int = 0
    pictures: str = ""


LAYOUTS = {
    "folders": Layout(),  # any pictures in a folder per class; ImageNet-R without its restriction
    "imagenet": Layout(),  # train/ or val/, class folders or flat with a label file beside
    "imagenet-sketch": Layout(),
    "imagenet-r": Layout(restrict=True),
    "imagenet-a": Layout(restrict=True),
    "imagenet-v2": Layout(classes="number"),
    # Its pictures have a red frame that its authors' loader cuts away, 2 pixels wide.
    "objectnet": Layout(classes="mapped", border=2, pictures="images"),
}
_OWN_CLASSES = ("folders", "imagenet")  # whose sorted class folders can serve as the class list


@dataclass(frozen=True)
class LabelledFolder:
    """Pictures of a folder and the classes that count as right for each.

    Attributes:
        source: as it was named, for messages.
        root: folder that `files` are relative to.
        files: in sorted order.
        groups: (n,) int32, the row of `answers` that each picture has.
        answers: class indices that count as right; the first one is the label.
        classes: the class list.
        choices: (m,) int64 sorted classes among which the answer is looked for; None means all.
        border: pixels to cut away on every side.
        left_out: pictures of classes outside the list, by what the folder calls them.
    """

    source: str
    root: Path
    files: list[str]
    groups: np.ndarray
    answers: list[tuple[int, ...]]
    classes: ClassList
    choices: np.ndarray | None
    border: int
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        """The file's bytes; raises `OSError` when it has gone."""
        return (self.root / self.files[index]).read_bytes()

    def name(self, index: int) -> str:
        """The path of picture `index`."""
        return str(self.root / self.files[index])

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64; where several classes count as right, the first."""
        return np.array([answer[0] for answer in self.answers], np.int64)[self.groups]


def split_source(source: str | Path) -> tuple[str, Path]:
    """(layout, folder) of `layout:folder`; the layout is "" for a folder of shards.

    Raises:
        UserError: something that looks like a layout and is none.
    """
    word, colon, folder = str(source).partition(":")
    if not colon or (word not in LAYOUTS and Path(source).exists()) or "/" in word:
        return "", Path(source)
    if word not in LAYOUTS:
        near = nearest(word, list(LAYOUTS))
        raise UserError(
            f"{source}: {word!r} is no layout of picture folders"
            + (f", did you mean {near}" if near else "")
            + f"? Type one of {', '.join(LAYOUTS)}, a colon and the folder"
        )
    return word, Path(folder)


def open_folder(
    source: str | Path, classes: ClassList | None = None, *, restrict: bool | None = None
) -> LabelledFolder:
    """The pictures of `layout:folder`, listed and labelled but not read.

    Args:
        classes: the classes that the learner tells apart. Without it, the sorted class folders are
            the classes, for the layouts `folders` and `imagenet`.
        restrict: look for the answer among the classes present only; None: as the layout is
            published.

    Raises:
        UserError: no such folder or layout, no pictures, no class list where one is needed, or a
            class folder that nothing explains.
    """
    name, folder = split_source(source)
    if not name:
        raise UserError(
            f"{source} names no layout; type one of {', '.join(LAYOUTS)} before a colon"
        )
    layout = LAYOUTS[name]
    if not folder.is_dir():
        raise UserError(f"{source}: {folder} is not a folder; name the folder of the pictures")
    root = folder / layout.pictures if (folder / layout.pictures).is_dir() else folder
    names, loose = _entries(root)
    table = find_label_file(root, inside_only=bool(names)) if name in _OWN_CLASSES else None
    if loose and not names and not table:
        raise UserError(
            f"{source}: {root} holds pictures but no class folders; put them into a folder per "
            "class, or write labels.csv there, with the columns file and label"
        )
    if classes is None:
        if name not in _OWN_CLASSES or table or not names:
            raise UserError(
                f"{source}: its labels are part of a larger list of classes; name that list, a "
                "text file with an identifier and a name per line, in classes"
            )
        classes = ClassList(names)
    if table:
        found = _listed(table, root, loose, classes)
    else:
        mapping = read_mapping(folder) if layout.classes == "mapped" else {}
        found = _in_class_folders(root, names, layout, classes, mapping)
    return _collect(str(source), root, found, classes, layout, restrict)


def _in_class_folders(
    root: Path, names: list[str], layout: Layout, classes: ClassList, mapping: dict[str, Labels]
) -> Iterator[tuple[str, tuple[int, ...] | str]]:
    for name in names:
        answer = _named(name, str(root / name), layout, classes, mapping)
        for file in _entries(root / name)[1]:
            yield f"{name}/{file}", answer


def _collect(
    source: str,
    root: Path,
    found: Iterator[tuple[str, tuple[int, ...] | str]],
    classes: ClassList,
    layout: Layout,
    restrict: bool | None,
) -> LabelledFolder:
    """`found` gives (file, right classes or, for a picture to leave out, what it is called)."""
    files, groups, rows, left_out = [], [], {}, Counter()
    for file, answer in found:
        if isinstance(answer, str):
            left_out[answer] += 1
        else:
            files.append(file)
            groups.append(rows.setdefault(answer, len(rows)))
    if not files:
        outside = f", {sum(left_out.values()):,} of classes outside the list" if left_out else ""
        raise UserError(
            f"{source}: no picture of the {len(classes)} classes was found below {root}{outside}; "
            "name the folder that holds the class folders, and the list of its classes"
        )
    restrict = layout.restrict if restrict is None else restrict
    present = np.unique([index for answer in rows for index in answer])
    return LabelledFolder(
        source=source,
        root=root,
        files=files,
        groups=np.array(groups, np.int32),
        answers=list(rows),
        classes=classes,
        choices=present.astype(np.int64) if restrict else None,
        border=layout.border,
        left_out=dict(left_out),
    )


def _entries(root: Path) -> tuple[list[str], list[str]]:
    """Sorted (folders, pictures) directly below a folder; hidden ones do not count."""
    folders, pictures = [], []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif _is_picture(entry.name):
                pictures.append(entry.name)
    return sorted(folders), sorted(pictures)


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in PICTURES


def _named(
    name: str, where: str, layout: Layout, classes: ClassList, mapping: dict[str, Labels]
) -> tuple[int, ...] | str:
    """Classes that count as right in a class folder, or its name when all are outside the list."""
    if layout.classes == "mapped":
        labels = explain(name, mapping, where)
    elif layout.classes == "identifier":
        labels = [name]
    elif name.isdecimal():
        labels = [int(name)]
    else:
        raise UserError(f"{where}: class folders of this layout are numbers from 0; remove it")
    return _right(labels, where, classes) or name


def _right(labels: Labels, where: str, classes: ClassList) -> tuple[int, ...]:
    """Indices of labels in the class list, without those outside it."""
    found = [
        classes.numbered(label, where) if isinstance(label, int) else classes.place(label, where)
        for label in labels
    ]
    return tuple(dict.fromkeys(index for index in found if index is not None))


def _listed(
    table: Path, root: Path, loose: list[str], classes: ClassList
) -> Iterator[tuple[str, tuple[int, ...] | str]]:
    """What a label file says, in the order of the sorted paths."""
    rows = read_label_file(table, root, loose)
    for file in sorted({*rows, *loose}):
        labels = rows.get(file)
        if labels is None:
            yield file, f"not in {table.name}"
        else:
            outside = "; ".join(map(str, labels))
            yield file, _right(labels, f"{table}: {file}", classes) or outside
