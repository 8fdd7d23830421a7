"""Conceptual 12M (Changpinyo et al. 2021): the validation part of 14,749 captioned pictures.

CC12M is published as `cc12m.tsv`, an address and a caption per line, and everybody downloads the
pictures. Three forms of the result are read, whichever the folder holds:

    *.npy + images/       a pickled array of dictionaries {"image_id": file, "captions": [text]};
                          opened by data/numpy_pickle.py, which never runs what a pickle asks for
    00000.tar ...         WebDataset shards with .jpg and .txt or .json, as img2dataset writes them
    *.tsv (+ images/)     a file and a caption per line, pictures and prompts; with addresses in
                          place of files, prompts alone

The prompt of a picture is its first caption. Pictures come in the order of the file. No labels, no
groups.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from etude.core.errors import UserError
from etude.data.numpy_pickle import load_npy
from etude.data.shards import ShardSet

from ..sets import PictureSet, ShardPictures
from . import data_set
from .items import BALANCED, Item, ItemDataSet, balanced, expect, read_text

COUNT = BALANCED
_ADDRESS = ("http://", "https://")


@data_set("cc12m")
class Cc12m(ItemDataSet):
    """CC12M's validation part: a caption per picture.

    Args:
        folder: holds the pictures and captions in one of the forms above.
        whole: refuse another number of pictures than 14,749.
    """

    name = "cc12m"

    def __init__(self, folder: str | Path, *, whole: bool = True) -> None:
        super().__init__(folder)
        self.whole = whole
        tables = [*sorted(self.folder.glob("*.npy")), *sorted(self.folder.glob("*.tsv"))]
        # A folder of shards has .npy files of its own: its index.
        self._shards = ShardSet(self.folder) if any(self.folder.glob("*.tar")) else None
        if self._shards is None and len(tables) != 1:
            raise UserError(
                f"{self.name}: {self.folder} holds {len(tables)} .npy and .tsv files and no .tar "
                f"shards; it needs one file of captions, or shards"
            )
        self._table = tables[0] if tables else self.folder
        images = self.folder / "images"
        self.root = images if images.is_dir() else self.folder

    def pictures(
        self, *, size: int = 0, fit: str = "crop", channels: int = 3, limit: int = 0
    ) -> PictureSet | None:
        """Its real pictures; None for captions with addresses alone."""
        form = {"size": size, "fit": fit, "channels": channels, "limit": limit}
        if self._shards is None:
            return super().pictures(**form)
        expect(len(self._shards), COUNT, self.whole, f"{self.folder}: the pictures")
        return ShardPictures(self.folder, rows=self._rows(), **form)

    def _rows(self) -> list[int] | None:
        """Which of the shards' samples; None for all."""
        return None

    def read_items(self) -> Iterable[Item]:
        if self._shards is not None:
            described = (self._shards.described(i) for i in range(len(self._shards)))
            found = [Item(key, "", caption.strip()) for key, _, caption in described]
        elif self._table.suffix == ".npy":
            found = self._from_npy()
        else:
            found = self._from_tsv()
        expect(len(found), COUNT, self.whole, f"{self._table}: the captions")
        return found

    def _from_npy(self) -> list[Item]:
        found = []
        for number, row in enumerate(np.ravel(load_npy(self._table))):
            captions = row.get("captions") if isinstance(row, dict) else None
            file = row.get("image_id", row.get("image_path")) if isinstance(row, dict) else None
            captions = [captions] if isinstance(captions, str) else captions
            if file is None or not isinstance(captions, list | tuple | np.ndarray) or not captions:
                raise UserError(
                    f"{self._table}: row {number} is no dictionary with an image_id and captions"
                )
            found.append(Item(str(file), str(file), str(captions[0]).strip()))
        return found

    def _from_tsv(self) -> list[Item]:
        found = []
        for number, line in enumerate(read_text(self._table).split("\n"), 1):
            if not line.strip():
                continue
            file, tab, caption = line.rstrip("\r").partition("\t")
            if not tab or not caption.strip():
                raise UserError(
                    f"{self._table}, line {number}: needs a file or address, a tab and a caption"
                )
            picture = "" if file.startswith(_ADDRESS) else file
            found.append(Item(file, picture, caption.strip()))
        return found


@data_set("cc12m15k")
class Cc12m15k(Cc12m):
    """14,749 of the rows: `random.Random(0).sample` over them in the order of the file or shards.

    Of the validation part these are all rows, in another order.
    """

    name = "cc12m15k"

    def read_items(self) -> Iterable[Item]:
        return balanced(list(super().read_items()))

    def _rows(self) -> list[int]:
        return balanced(range(len(self._shards)))
