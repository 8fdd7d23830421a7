"""Data sets of one's own: a folder of pictures, a folder of shards, or a CSV table."""

import os
from collections.abc import Iterable
from pathlib import Path

from etude.core.errors import UserError
from etude.data.shards import ShardSet

from ..sets import SUFFIXES, FolderPictures, ShardPictures
from ..text_files import METADATA, read_metadata
from . import Prompt, Prompts, data_set
from .items import Item, ItemDataSet, read_table, read_text


@data_set("folder")
class Folder:
    """Picture files in a folder.

    Class subfolders give labels and groups, or a `metadata.csv` does (file_name, label, group).
    Prompts are the captions in that table's column caption, or in a `.txt` beside each picture, of
    which none may be missing; without captions but with classes, a prompt asks for the picture's
    class.

    Args:
        folder: of the pictures.
    """

    name = "folder"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def pictures(
        self, *, size: int = 0, fit: str = "crop", channels: int = 3, limit: int = 0
    ) -> FolderPictures:
        """Its pictures, sorted by name, `limit` of them spread over all (0: all)."""
        return FolderPictures(self.folder, size=size, fit=fit, channels=channels, limit=limit)

    def prompts(self) -> Prompts | None:
        """Its captions or classes; None where there are neither."""
        found = self.pictures()
        captions = self._captions(found.files)
        asked = zip(found.files, found.labels.tolist(), found.groups, strict=True)
        return _asked(self.name, list(asked), captions, found.classes)

    def _captions(self, files: list[str]) -> list[str]:
        rows = read_metadata(self.folder)
        if rows:
            return [rows[file].get("caption", "").strip() for file in files]
        beside = [str(Path(file).with_suffix(".txt")) for file in files]
        folders = {str(Path(name).parent) for name in beside}
        there = {str(Path(one, name)) for one in folders for name in os.listdir(self.folder / one)}
        absent = [name for name in beside if name not in there]
        if len(absent) == len(beside):
            return [""] * len(files)
        if absent:
            raise UserError(
                f"{self.folder / absent[0]} is missing and other pictures have a caption; write it "
                "or take the captions out of the folder"
            )
        return [read_text(self.folder / name).strip() for name in beside]


@data_set("shards")
class Shards:
    """WebDataset shards; captions are the prompts, or classes where there are none.

    Args:
        folder: of the `.tar` files.
    """

    name = "shards"
    grouped = False  # whether `group` is not the class

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shards = ShardSet(self.folder)

    def rows(self) -> list[int] | None:
        """Numbers of the samples that are the set; None for all as stored."""
        return None

    def group(self, key: str, label: int) -> str:
        """The group of a sample."""
        classes = self._shards.classes
        return classes[label] if 0 <= label < len(classes) else ""

    def pictures(
        self, *, size: int = 0, fit: str = "crop", channels: int = 3, limit: int = 0
    ) -> ShardPictures:
        """Its pictures in stored order, `limit` of them spread over all (0: all)."""
        described = self._described() if self.grouped else []
        return ShardPictures(
            self.folder,
            size=size,
            fit=fit,
            channels=channels,
            limit=limit,
            rows=self.rows(),
            groups=[self.group(key, label) for key, label, _ in described] or None,
        )

    def prompts(self) -> Prompts | None:
        """Its captions or classes; None where there are neither."""
        found = self._described()
        asked = [(key, label, self.group(key, label)) for key, label, _ in found]
        captions = [caption.strip() for _, _, caption in found]
        return _asked(self.name, asked, captions, self._shards.classes)

    def _described(self) -> list[tuple[str, int, str]]:
        """(key, label, caption) of the samples of the set."""
        rows = self.rows()
        numbers = range(len(self._shards)) if rows is None else rows
        return [self._shards.described(i) for i in numbers]


@data_set("csv")
class Table(ItemDataSet):
    """A CSV table with the columns file_name or caption, or both, and label, group and id if any.

    Rows keep their order. Labels are class names, numbered in sorted order, or numbers already. The
    id is the column's, else the file's name, else the row's number from 0.

    Args:
        folder: the table, whose pictures lie relative to it; or a folder with a `metadata.csv`.
    """

    name = "csv"

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        super().__init__(path if path.is_dir() else path.parent)
        self._table = path / METADATA if path.is_dir() else path
        if not self._table.is_file():
            raise UserError(f"{self.name}: {self._table} is not there; name a CSV table")
        self._rows = read_table(self._table, [])
        columns = self._rows[0] if self._rows else {}
        if not {"file_name", "caption"} & set(columns):
            raise UserError(f"{self._table} needs a column file_name or caption and a row")
        labels = {row.get("label", "") for row in self._rows} - {""}
        if labels and all(label.isdecimal() for label in labels):
            names = [str(i) for i in range(max(map(int, labels)) + 1)]
            self._labels = {label: int(label) for label in labels}
        else:
            names = sorted(labels)
            self._labels = {name: place for place, name in enumerate(names)}
        self.classes = tuple(names)

    def read_items(self) -> Iterable[Item]:
        for number, row in enumerate(self._rows):
            file = row.get("file_name", "")
            if file and Path(file).suffix.lower() not in SUFFIXES:
                raise UserError(f"{self._table}: {file} is no .png, .jpg or .webp picture")
            text = row["caption"].strip() if "caption" in row else None
            label = self._labels.get(row.get("label", ""), -1)
            yield Item(
                row.get("id") or file or str(number), file, text, label, row.get("group", "")
            )


def _asked(
    name: str, rows: list[tuple[str, int, str]], captions: list[str], classes: list[str]
) -> Prompts | None:
    """Prompts from captions, or from classes where there are no captions; None without both."""
    if not any(captions) and all(label < 0 for _, label, _ in rows):
        return None
    found = [
        Prompt(id, caption, label, group)
        for (id, label, group), caption in zip(rows, captions, strict=True)
    ]
    return Prompts(name, tuple(found), tuple(classes))
