"""WebDataset shards: writing them, and opening a folder of them for reading at random.

Called by the loaders, the pool, `etude start` and the evaluation. A folder of plain WebDataset tars
is enough; its index is built on first opening. Tars are memory-mapped, and every sample's bytes are
compared with the checksum taken when the index was built.
"""

import json
import mmap
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from etude.core.errors import UserError
from etude.core.files import file_sha256

from .files import new_folder
from .index import NAME, SCALAR, Index, build_index, caption_of, read_index
from .picture import BadPicture

_OPEN_SHARDS = 256  # well below the usual limit of 1,024 open files


@dataclass(frozen=True)
class Sample:
    """One stored picture.

    Attributes:
        key: unique within the folder.
        data: the encoded picture.
        extension: lower-case file extension, such as "jpg".
        label: class number, -1 when the folder has no labels.
        caption: "" when the folder has no captions.
        shard: file name of the tar.
        scalars: the numbers in its `.json` that every sample of the folder has.
    """

    key: str
    data: memoryview | bytes
    extension: str
    label: int
    caption: str
    shard: str
    scalars: Mapping[str, float] = field(default_factory=dict)


def write_shards(
    folder: str | Path,
    samples: Iterable[Mapping[str, Any]],
    *,
    per_shard: int = 1000,
    classes: Sequence[str] = (),
) -> None:
    """Writes a new folder of shards with its index; the folder appears only when complete.

    Args:
        samples: mappings with `key` (str), `image` (encoded bytes), `extension` ("png", "jpg"),
            and optionally `label` (int), `caption` (str) and `meta` (a dict stored as `.json`;
            the numbers in it are what `ShardSet.scalars` names).
        per_shard: samples per tar. Equal samples give equal bytes.
        classes: class names; label i is classes[i].

    Raises:
        UserError: the folder is not empty, or a sample is not valid.
    """
    with new_folder(Path(folder)) as draft:
        if classes:
            (draft / "classes.txt").write_text("\n".join(classes) + "\n", "utf-8")
        batch: list[dict[str, Any]] = []
        number = 0
        for sample in samples:
            batch.append(_members(sample))
            if len(batch) == per_shard:
                _write_tar(draft / f"{number:06d}.tar", batch)
                batch, number = [], number + 1
        if batch:
            _write_tar(draft / f"{number:06d}.tar", batch)
        build_index(draft, draft)


def _members(sample: Mapping[str, Any]) -> dict[str, Any]:
    members = {"__key__": sample["key"], sample["extension"]: bytes(sample["image"])}
    if sample.get("label") is not None and sample["label"] >= 0:
        members["cls"] = str(int(sample["label"])).encode()
    if sample.get("caption"):
        members["txt"] = sample["caption"].encode()
    if sample.get("meta"):
        members["json"] = json.dumps(sample["meta"], sort_keys=True).encode()
    return members


def _write_tar(path: Path, batch: list[dict[str, Any]]) -> None:
    try:
        from webdataset.writer import TarWriter
    except ImportError:
        raise UserError("writing shards needs webdataset; type: pip install webdataset") from None
    with open(path, "wb") as file:
        # A fixed time and owner make equal samples give equal bytes; PAX allows long keys.
        writer = TarWriter(
            file, user="", group="", mtime=0.0, encoder=False, compress=False, format="PAX_FORMAT"
        )
        for members in batch:
            writer.write(members)
        writer.close()


class ShardSet:
    """A folder of shards as a sequence of samples.

    Attributes:
        folder: where the tars are.
        classes: class names, empty when `classes.txt` is absent.
        fingerprint: sha256 of the stored content (shard hashes and classes).
        labelled, captioned: whether every sample has a label, a caption.
        scalars: names of the numbers that every sample's `.json` holds.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        verify: bool = False,
        index_folder: str | Path | None = None,
    ) -> None:
        """Opens a folder of tars, building its index if there is none.

        Args:
            verify: also compare the sha256 of every tar with the index (reads everything).
            index_folder: where the index lies, for folders that cannot be written to.

        Raises:
            UserError: no such folder, or a structural fault, with the shard and member.
        """
        self.folder = Path(folder)
        self._index_folder = Path(index_folder) if index_folder else self.folder
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; name a folder of WebDataset tars")
        if (self._index_folder / NAME).is_file():
            self._index = read_index(self.folder, self._index_folder)
        else:
            self._index = build_index(self.folder, self._index_folder)
        if verify:
            self._verify()
        self.classes = list(self._index.classes)
        self.labelled, self.captioned = self._index.labelled, self._index.captioned
        self.scalars = tuple(self._index.scalars or ())
        self.fingerprint = self._index.content()
        self.shard_sizes = tuple(shard.count for shard in self._index.shards)
        self._ends = np.cumsum(self.shard_sizes)
        self._maps: OrderedDict[int, tuple[memoryview, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` in stored order; `data` is a view into the memory-mapped tar.

        Raises:
            BadPicture: the bytes differ from those that were indexed.
        """
        shard, member = self._place(index)
        view, table = self._open(shard)
        row = table[member]
        start, size = int(row["image_offset"]), int(row["image_size"])
        data = view[start : start + size]
        start, size = int(row["text_offset"]), int(row["text_size"])
        text = bytes(view[start : start + size])
        name = self._index.shards[shard].name
        key = self._key(shard, row["key"])
        if zlib.crc32(text, zlib.crc32(data)) != row["crc"]:
            raise BadPicture(f"{key} in {name}: the bytes are not those that were indexed")
        caption = caption_of(text, int(row["text"]), f"{name}: {key}") if row["text"] else ""
        extension = row["extension"].decode()
        scalars = {name: float(row[SCALAR + name]) for name in self.scalars}
        return Sample(key, data, extension, int(row["label"]), caption, name, scalars)

    def shard_of(self, index: int) -> tuple[str, int]:
        """(file name of the tar, number of the sample inside it)."""
        shard, member = self._place(index)
        return self._index.shards[shard].name, member

    def key_of(self, index: int) -> str:
        """The sample's key, without reading its picture."""
        shard, member = self._place(index)
        return self._key(shard, self._open(shard)[1][member]["key"])

    def described(self, index: int) -> tuple[str, int, str]:
        """(key, label, caption) without the checks on the picture; the caption of a sample whose
        bytes are damaged is ""."""
        try:
            sample = self[index]
        except BadPicture:
            shard, member = self._place(index)
            row = self._open(shard)[1][member]
            return self._key(shard, row["key"]), int(row["label"]), ""
        return sample.key, sample.label, sample.caption

    @property
    def labels(self) -> np.ndarray:
        """All labels in stored order, (len,) int64, without reading any picture."""
        return self._column("label").astype(np.int64)

    def scalar(self, name: str, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """One of `scalars`, (n,) float64: of some samples, or of all in stored order."""
        if indices is None:
            return self._column(SCALAR + name)
        places = [self._place(int(index)) for index in indices]
        return np.array([self._open(shard)[1][SCALAR + name][row] for shard, row in places])

    def _column(self, name: str) -> np.ndarray:
        tables = [self._open(shard)[1][name] for shard in range(len(self.shard_sizes))]
        return np.concatenate(tables)

    def _key(self, shard: int, key: bytes) -> str:
        text = key.decode()
        if self._index.shard_in_key:
            return f"{self._index.shards[shard].name.removesuffix('.tar')}/{text}"
        return text

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index) - int(self._ends[shard]) + self.shard_sizes[shard]

    def _open(self, shard: int) -> tuple[memoryview, np.ndarray]:
        with self._lock:
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
            entry = self._index.shards[shard]
            with open(self.folder / entry.name, "rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            table = np.load(
                self._index_folder / entry.offsets,
                mmap_mode="r",
                allow_pickle=False,
                max_header_size=1 << 24,  # a column for each number in the samples' .json
            )
            self._maps[shard] = (view, table)
            if len(self._maps) > _OPEN_SHARDS:
                self._maps.popitem(last=False)
            return view, table

    def _verify(self) -> None:
        for shard in self._index.shards:
            path = self.folder / shard.name
            if file_sha256(path) != shard.sha256:
                raise UserError(
                    f"{path} differs from its index (sha256); copy the shard again,"
                    f" or if it is right delete {self._index_folder / NAME}"
                )

    @property
    def index(self) -> Index:
        """The checked content of index.json."""
        return self._index
