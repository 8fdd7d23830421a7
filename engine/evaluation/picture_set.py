"""What a set of pictures is, and what draws one; read by extract.py, implemented in sets.py.

Whatever it comes from, a set has a fingerprint and gives uint8 pictures with sample keys, labels
and groups for any range of its consecutive numbers, so extraction resumes anywhere.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass
class Stages:
    """Seconds spent per stage of a pipeline."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time of the block towards `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Pictures:
    """Consecutive pictures.

    Attributes:
        images: uint8 (B, H, W, C); where pictures are of different sizes, a list of B arrays
            (H, W, C), which the extractor brings to its own size one by one.
        labels: (B,) int64, -1 for none.
        groups: "" for none.
    """

    images: np.ndarray | list[np.ndarray]
    keys: list[str]
    labels: np.ndarray
    groups: list[str]


class PictureSet(Protocol):
    """A numbered set of pictures.

    Attributes:
        name: shown to people.
        fingerprint: sha256 of everything that fixes the pictures, their labels and groups.
        classes: class names, empty without labels.
        protocol: what the set adds to an evaluation's protocol, "image_size" and "fit" among it.
    """

    name: str
    fingerprint: str
    classes: list[str]
    protocol: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop (exclusive)."""
        ...


class Generator(Protocol):
    """What draws pictures; `etude.sampling.Generator` is one."""

    name: str
    fingerprint: str

    @property
    def protocol(self) -> dict[str, Any]: ...

    def draw(self, indices: np.ndarray, labels: np.ndarray, *, seed: int) -> Any:
        """uint8 (B, H, W, C), alone or first in a tuple, of indices and labels (B,) int64."""
        ...


def stacked(images: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Arrays (H, W, C) of one shape as (B, H, W, C); the list itself where shapes differ."""
    alike = len({image.shape for image in images}) == 1
    return np.stack(list(images)) if alike else list(images)


def group_of(classes: Sequence[str], label: int) -> str:
    """The class as a group; "" without a label."""
    return classes[label] if 0 <= label < len(classes) else ""


def digest(parts: list) -> str:
    """sha256 of plain values, 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
