"""Labelled pictures as a learner sees them: a real split in memory, or a pool (`data/pool.py`).

Called by every file of this room. Pictures are uint8 (B, S, S, C) wherever they are kept, and
become float32 (B, C, S, S) in [-1, 1] only on their way into a model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.data.augment import AugmentConfig
from etude.data.loader import DataConfig
from etude.data.shards import ShardSet
from etude.data.still import still_loader

_CHUNK = 256  # pictures decoded at a time


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


def load_split(folder: str | Path, preparation: AugmentConfig) -> Stored:
    """A real split in stored order, prepared without chance, held in memory as uint8.

    Raises:
        UserError: a random preparation, a picture that cannot be read, or one without a label.
    """
    if preparation.crop == "random" or preparation.flip:
        raise UserError(
            "pictures.crop=random and pictures.flip=true would change the real splits at random: "
            "type pictures.crop=center and learner.flip instead"
        )
    shards = ShardSet(folder)
    config = DataConfig(shards=str(folder), augment=preparation, decoder="torch", max_bad_rate=1.0)
    loader = still_loader(shards, config)
    size, channels = preparation.image_size, preparation.channels
    pixels = np.empty((len(shards), size, size, channels), np.uint8)
    classes = np.empty(len(shards), np.int64)
    for rows in chunks(np.arange(len(shards)), _CHUNK):
        batch = loader.fetch(rows)
        levels = ((batch.images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels[rows], classes[rows] = levels.permute(0, 2, 3, 1).numpy(), batch.labels.numpy()
    loader.close()
    if loader.bad:
        key, reason = loader.bad[0]
        raise UserError(f"{folder}: {key} cannot be read ({reason}); repair or remove it")
    if len(classes) and classes.min() < 0:
        key = shards.key_of(int(classes.argmin()))
        raise UserError(f"{folder}: {key} has no label, and a learner needs one for every picture")
    return Stored(pixels, classes, shards.classes)


def to_model(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, S, S, C) in [0, 255] to float32 (B, C, S, S) in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    return tensor.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def chunks(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive pieces of at most `size` entries."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
