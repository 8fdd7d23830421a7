"""The files of a text cache; called by `texts.py` alone.

A folder holds the features of texts under one key (encoders, precision, length). Each safetensors
file packs the tokens of some texts behind each other: text (sum of lengths, d), starts (n + 1,),
pooled (n, p), digests (n, 16) of the texts, and crc (n,) of each text's bytes; the key is in the
header. A file is whole or absent and never changes, so any number of processes may add files at
once: a text that two of them wrote is read from the first file by name. The index is made of the
digests when the folder is opened.
"""

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.core.files import read_json, write_bytes_atomic, write_json_atomic

PLAN = "plan.json"
DIGEST_BYTES = 16
_OPEN_FILES = 256  # well below the usual limit of 1,024 open files


def keyed(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with the sha256 over all of it under "key"."""
    text = json.dumps(plan, sort_keys=True)
    return plan | {"key": hashlib.sha256(text.encode()).hexdigest()}


def digest(caption: str) -> bytes:
    """What a text is found by."""
    return hashlib.sha256(caption.encode()).digest()[:DIGEST_BYTES]


def write_texts(
    folder: Path,
    key: str,
    captions: Sequence[str],
    tokens: Sequence[Tensor],
    pooled: Tensor,
) -> Path:
    """Writes one file, whole or not at all.

    Args:
        captions: n texts, each once.
        tokens: of each text (length, d), on the CPU.
        pooled: (n, p), on the CPU.
    """
    from safetensors.torch import save

    digests = [digest(caption) for caption in captions]
    starts = np.cumsum([0, *(len(rows) for rows in tokens)])
    sums = [_checksum(rows, vector) for rows, vector in zip(tokens, pooled, strict=True)]
    tensors = {
        "text": torch.cat(list(tokens)).contiguous(),
        "starts": torch.from_numpy(starts.astype(np.int64)),
        "pooled": pooled.contiguous(),
        "digests": torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy()).view(
            len(digests), DIGEST_BYTES
        ),
        "crc": torch.tensor(sums, dtype=torch.int64),
    }
    name = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    path = folder / f"text-{name}.safetensors"
    write_bytes_atomic(path, save(tensors, {"etude": json.dumps({"key": key})}))
    return path


class TextCache:
    """The texts of one folder, memory-mapped; each text's bytes are checked when first read."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        """Opens a folder, or begins it.

        Raises:
            UserError: it holds features of another plan, or a damaged file.
        """
        self.folder, self.key = Path(folder), plan["key"]
        self._files: list[Path] = []
        self._open: OrderedDict[int, tuple[Any, dict[str, Tensor]]] = OrderedDict()
        self._checked: set[int] = set()
        if (self.folder / PLAN).is_file():
            found = read_json(self.folder / PLAN)
            if not isinstance(found, dict) or found.get("key") != self.key:
                raise UserError(
                    f"{self.folder} holds features of another text encoder or length: name another"
                    " text.folder or delete it"
                )
        else:
            write_json_atomic(self.folder / PLAN, plan)
        self.refresh()

    def __len__(self) -> int:
        return len(self._digests)

    def refresh(self) -> None:
        """Look again at what the folder holds."""
        self._files = sorted(self.folder.glob("text-*.safetensors"))
        self._open.clear()
        self._checked.clear()
        found = [np.asarray(self._tensors(n)[1]["digests"]) for n in range(len(self._files))]
        counts = [len(rows) for rows in found]
        every = np.concatenate([*found, np.zeros((0, DIGEST_BYTES), np.uint8)])
        every = np.ascontiguousarray(every).view(f"S{DIGEST_BYTES}")[:, 0]
        # The first of equal ones, which is in the first file by name.
        self._digests, first = np.unique(every, return_index=True)
        numbers = np.repeat(np.arange(len(counts)), counts)
        rows = np.concatenate([*(np.arange(n) for n in counts), np.zeros(0, np.int64)])
        self._places = np.stack((numbers[first], rows[first]), axis=1).astype(np.int64)

    def has(self, captions: Sequence[str]) -> np.ndarray:
        """Which texts are here, (n,) bool."""
        return self._find(captions)[1]

    def read(self, caption: str) -> tuple[Tensor, Tensor]:
        """A text's tokens (length, d) and pooled vector (p,), as stored.

        Raises:
            KeyError: the text is not here.
            UserError: its bytes are damaged.
        """
        (place,), (here,) = self._find([caption])
        if not here:
            raise KeyError(caption)
        number, row = self._places[place].tolist()
        file, small = self._tensors(number)
        start, stop = small["starts"][row].item(), small["starts"][row + 1].item()
        tokens, pooled = file.get_slice("text")[start:stop], file.get_slice("pooled")[row]
        if place not in self._checked:
            if _checksum(tokens, pooled) != small["crc"][row].item():
                raise _damaged(self._files[number], f"the features of {caption!r} changed")
            self._checked.add(int(place))
        return tokens, pooled

    def _find(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.array([digest(c) for c in captions], dtype=f"S{DIGEST_BYTES}")
        places = np.searchsorted(self._digests, wanted)
        here = places < len(self._digests)
        here[here] = self._digests[places[here]] == wanted[here]
        return places, here

    def _tensors(self, number: int) -> tuple[Any, dict[str, Tensor]]:
        """An open file, and its tensors that say where the others' rows are."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        from safetensors import SafetensorError, safe_open

        path = self._files[number]
        try:
            file = safe_open(path, framework="pt")
            key = json.loads((file.metadata() or {})["etude"])["key"]
            small = {name: file.get_tensor(name) for name in ("starts", "digests", "crc")}
            counts = {len(small["starts"]) - 1, len(small["digests"]), len(small["crc"])}
            whole = file.get_slice("text").get_shape()[0] == int(small["starts"][-1])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, str(error)) from error
        if key != self.key or len(counts) > 1 or not whole:
            raise _damaged(
                path, "it belongs to another cache" if key != self.key else "its sizes differ"
            )
        self._open[number] = (file, small)
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return self._open[number]


def _checksum(tokens: Tensor, pooled: Tensor) -> int:
    sums = 0
    for tensor in (tokens, pooled):
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        sums = zlib.crc32(flat.numpy(), sums)
    return sums


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}); delete the file to encode its texts again")
