"""What a set of pictures is, and what draws one; read by extract.py, implemented in sets.py.

Whatever it comes from, a set has a fingerprint and gives uint8 pictures with sample keys, labels
and groups for any range of its consecutive numbers, so extraction resumes anywhere.
"""

import hashlib
import json
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from etude.core.errors import UserError
from etude.core.rng import Stream, permute


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


def class_numbers(
    theirs: Sequence[str], ours: Sequence[str], generator: str, name: str
) -> list[int]:
    """The generator's number of every class of a data set; empty where it states no classes.

    A name that both know stands for one class, whatever its number. Where they share no name, as
    ImageNet's and a model's that only numbers its classes, equal numbers are one class.

    Args:
        theirs, ours: names of the generator's classes and of the data set's, in index order.
        generator, name: what has them, as messages say it.

    Raises:
        UserError: they have unequal numbers of classes, or share some names out of order.
    """
    if not theirs:
        return []
    if len(ours) != len(theirs):
        raise UserError(
            f"{generator} knows {len(theirs)} classes and {name} has {len(ours)}; name a data set"
            " with the classes it was trained on"
        )
    places = {one: number for number, one in enumerate(theirs)}
    if places.keys() == set(ours):
        return [places[one] for one in ours]
    for number, one in enumerate(ours):
        if places.get(one, number) != number:
            other = next(one for one in ours if one not in places)
            raise UserError(
                f"{generator} and {name} name their classes differently: both have {one!r}, and"
                f" only {name} has {other!r}; name its classes as the generator does"
            )
    return list(range(len(ours)))


def stacked(images: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Arrays (H, W, C) of one shape as (B, H, W, C); the list itself where shapes differ."""
    alike = len({image.shape for image in images}) == 1
    return np.stack(list(images)) if alike else list(images)


def spread_order(strata: Sequence[Hashable]) -> list[int]:
    """Numbers 0 to N - 1, mixed so that any first n hold every stratum by its share, within one.

    What lies together in a set, as classes of a folder, is so taken evenly. The order depends on
    the strata (N,) alone.
    """
    mixed = permute(np.arange(len(strata)), len(strata), 0, Stream.SPREAD, 0) if strata else []
    members: dict[Hashable, list[int]] = {}
    for place in mixed:
        members.setdefault(strata[place], []).append(int(place))
    due = {
        place: (rank + 0.5) / len(of) for of in members.values() for rank, place in enumerate(of)
    }
    return sorted(map(int, mixed), key=due.__getitem__)


def spread(strata: Sequence[Hashable], limit: int) -> list[int]:
    """The numbers of `limit` of N, by `spread_order`, ascending; all where limit is 0 or N."""
    if not limit or limit >= len(strata):
        return list(range(len(strata)))
    return sorted(spread_order(strata)[:limit])


def group_of(classes: Sequence[str], label: int) -> str:
    """The class as a group; "" without a label."""
    return classes[label] if 0 <= label < len(classes) else ""


def digest(parts: list) -> str:
    """sha256 of plain values, 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
