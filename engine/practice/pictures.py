"""Labelled pictures as a learner sees them: a real split, or a pool (`data/pool.py`).

Called by every file of this room. Pictures are uint8 (B, S, S, C) wherever they are kept, and
become float32 (B, C, S, S) in [-1, 1] only on their way into a model. A real split is a folder of
shards or a published folder of pictures (`data/labelled_folders.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from etude.core.config import option
from etude.core.errors import UserError
from etude.data.augment import AugmentConfig
from etude.data.class_list import ClassList
from etude.data.labelled_folders import open_folder, split_source
from etude.data.prepared import CACHE_BYTES, PreparedPictures
from etude.data.shards import ShardSet


class PicturesConfig(AugmentConfig):
    """How the pictures of real splits are prepared."""

    shorter_side: int = option(
        0,
        "resize the shorter side to this, then cut image_size from the centre; 0 cuts the largest"
        " square first",
        unit="pixels",
        ge=0,
    )

    @model_validator(mode="after")
    def _check_side(self) -> Self:
        if self.shorter_side and (self.crop == "none" or self.shorter_side < self.image_size):
            raise ValueError(
                f"shorter_side={self.shorter_side} needs crop: center and at least image_size="
                f"{self.image_size} pixels; 0 turns it off"
            )
        return self


class Pictures(Protocol):
    """A set of labelled pictures: a pool of generated ones or a split of real ones."""

    def __len__(self) -> int: ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, C) of indices (B,) int64."""

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """int64 (B,) of indices (B,) int64."""


@dataclass(frozen=True)
class Stored:
    """Pictures held in memory: `pixels` (n, S, S, C) uint8 and `classes` (n,) int64."""

    pixels: np.ndarray
    classes: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """See `Pictures.images`."""
        return self.pixels[indices]

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """See `Pictures.labels`."""
        return self.classes[indices]


@dataclass(frozen=True)
class Streamed:
    """Pictures decoded when they are asked for.

    Attributes:
        pictures: decodes, and keeps some.
        classes: (n,) int64; where several classes count as right, the first.
        class_names: in index order.
        groups: (n,) row of `answers` that each picture has.
        answers: (G, K) bool, which classes count as right.
        choices: (m,) int64, the classes among which the answer is looked for; None means all.
        left_out: pictures of classes outside the list, by what the source calls them.
    """

    pictures: PreparedPictures
    classes: np.ndarray
    class_names: list[str]
    groups: np.ndarray
    answers: np.ndarray
    choices: np.ndarray | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.classes)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """See `Pictures.images`; raises `UserError` on a damaged picture, which it names."""
        return self.pictures.images(indices)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """See `Pictures.labels`."""
        return self.classes[indices]

    def accepted(self, indices: np.ndarray) -> np.ndarray:
        """Which classes count as right, (B, K) bool, of indices (B,) int64."""
        return self.answers[self.groups[indices]]


def load_split(
    source: str | Path,
    preparation: AugmentConfig,
    classes: ClassList | None = None,
    *,
    restrict: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Stored | Streamed:
    """A real split in the order in which it is stored, prepared without chance.

    Shards that fit `cache_bytes` when decoded are held in memory as `Stored`. Everything else is
    decoded when it is asked for, and as much of it kept as fits.

    Args:
        source: a folder of shards, or `layout:folder` (`data/labelled_folders.py`).
        preparation: size, crop and channels; a `PicturesConfig` may name a shorter side.
        classes: what class index c means; pictures of other classes are left out. None takes the
            shards' own classes, or the sorted class folders.
        restrict: look for the answer among the classes present only; None: as the layout is
            published, which is so for ImageNet-R and -A.

    Raises:
        UserError: a random preparation, a picture of shards in memory that cannot be read, one
            without a label, or whatever `open_folder` refuses.
    """
    side = preparation.shorter_side if isinstance(preparation, PicturesConfig) else 0
    layout, folder = split_source(source)
    if layout:
        found = open_folder(source, classes, restrict=restrict)
        answers = np.zeros((len(found.answers), len(found.classes)), bool)
        for row, right_classes in enumerate(found.answers):
            answers[row, list(right_classes)] = True
        pictures = PreparedPictures(
            found, preparation, shorter_side=side, border=found.border, cache_bytes=cache_bytes
        )
        names, left_out = found.classes.names, found.left_out
        return Streamed(
            pictures, found.labels, names, found.groups, answers, found.choices, left_out
        )
    shards = ShardSet(folder)
    labels, left_out = _shard_labels(shards, classes)
    rows = np.flatnonzero(labels >= 0)
    labels, names = labels[rows], classes.names if classes is not None else shards.classes
    size = len(rows) * preparation.image_size**2 * preparation.channels
    held = size <= cache_bytes and not restrict
    pictures = PreparedPictures(
        _Shards(shards, rows),
        preparation,
        shorter_side=side,
        cache_bytes=0 if held else cache_bytes,
    )
    if held:
        return Stored(pictures.images(np.arange(len(rows))), labels, names)
    count = len(names) or int(labels.max()) + 1
    choices = np.unique(labels) if restrict else None
    return Streamed(pictures, labels, names, labels, np.eye(count, dtype=bool), choices, left_out)


@dataclass(frozen=True)
class _Shards:
    """Some samples of shards as encoded pictures (`data/prepared.py`)."""

    shards: ShardSet
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> memoryview | bytes:
        return self.shards[int(self.rows[index])].data

    def name(self, index: int) -> str:
        return f"{self.shards.folder}: {self.shards.key_of(int(self.rows[index]))}"


def _shard_labels(shards: ShardSet, classes: ClassList | None) -> tuple[np.ndarray, dict[str, int]]:
    """Class index of every sample, (n,) int64, -1 outside the list; how many are, by class."""
    stored, where = shards.labels, str(shards.folder)
    if len(stored) and stored.min() < 0:
        key = shards.key_of(int(stored.argmin()))
        raise UserError(f"{where}: {key} has no label, and a learner needs one for every picture")
    if classes is None:
        return stored, {}
    present = np.unique(stored)
    if shards.classes:
        called = {int(c): shards.classes[c] for c in present}
        index = {c: classes.place(name, where) for c, name in called.items()}
    else:
        whole = (classes.whole or classes).identifiers
        if len(stored) and present[-1] >= len(whole):
            raise UserError(
                f"{where}: label {present[-1]} has no place in a list of {len(whole)} classes; "
                "name the list that its labels count in"
            )
        called = {int(c): whole[c] for c in present}
        index = {c: classes.find(name, where) for c, name in called.items()}
    labels = np.full(len(stored), -1, np.int64)
    left_out = {}
    for c, place in index.items():
        if place is None:
            left_out[called[c]] = int((stored == c).sum())
        else:
            labels[stored == c] = place
    if labels.size and labels.max() < 0:
        raise UserError(
            f"{where}: none of its pictures belongs to the {len(classes)} classes; name the list "
            "of its classes"
        )
    return labels, left_out


def right(logits: Tensor, split: Pictures, indices: np.ndarray) -> Tensor:
    """Which pictures are labelled rightly, (B,) bool on the device of the logits.

    The answer is the class of the largest logit, among `choices` where a split has them, and it is
    right when it is any of the classes accepted for the picture.

    Args:
        logits: (B, K) of the pictures `indices` (B,) of the split.
    """
    if not isinstance(split, Streamed):
        return logits.argmax(dim=-1) == torch.from_numpy(split.labels(indices)).to(logits.device)
    answer = logits.argmax(dim=-1)
    if split.choices is not None:
        choices = torch.from_numpy(split.choices).to(logits.device)
        answer = choices[logits[:, choices].argmax(dim=-1)]
    accepted = torch.from_numpy(split.accepted(indices)).to(logits.device)
    return accepted.gather(1, answer[:, None])[:, 0]


def to_model(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, S, S, C) in [0, 255] to float32 (B, C, S, S) in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return tensor.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def chunks(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most `size` entries."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
