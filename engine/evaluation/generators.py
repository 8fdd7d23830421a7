"""What draws pictures in a plan, by name; called by planned/, filled from above.

The sampler lives above this room, so `etude.generators` registers the built-in ones. A generator of
somebody's own is a function under `@generator("name")` in any file that the plan names in `files`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from etude.core.errors import UserError
from etude.core.registry import Registry


class NoCheckpointYet(UserError):
    """A run that is being trained keeps no checkpoint yet; a plan that watches waits for one."""


class DrawsPictures(Protocol):
    """An opened generator.

    Attributes:
        name: shown to people.
        fingerprint: changes whenever the pictures do.
        protocol: how it draws, plain values; "sampler", "profile" and "rounding" are known names.
        classes: class names of a generator asked by class, in index order.
        asked_by_text: whether it is given prompts.
    """

    name: str
    fingerprint: str
    protocol: dict[str, Any]
    classes: Sequence[str]
    asked_by_text: bool

    def draw(
        self,
        indices: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int,
        captions: Sequence[str] | None,
        positions: np.ndarray,
    ) -> Any:
        """Pictures (n, H, W, C) uint8, alone or first in a tuple.

        Args:
            indices: (n,) int64, consecutive numbers of a block.
            labels: (n,) int64, the class of each; -1 where nothing is asked by class.
            seed: names the sequence of pictures.
            captions: n prompts, None for a generator asked by class.
            positions: (n,) int64 in [0, 2^39): with the seed, what a picture's noise depends on.
        """
        ...


@dataclass(frozen=True)
class Wanted:
    """Which generator to open, from a plan's model.

    Attributes:
        source: a folder, a file, a run's name: the kind knows.
        checkpoint: images seen of the checkpoint; None for the newest, or where there is one only.
        guidance: the scale of classifier-free guidance; None leaves the generator's own.
        weights: profile of the weights; "" the generator's own choice.
        prompts: every text that will be asked for, for generators that encode them beforehand.
        options: of the plan's model.
    """

    source: str
    checkpoint: int | None = None
    guidance: float | None = None
    weights: str = ""
    prompts: tuple[str, ...] = ()
    device: torch.device | str = "cpu"
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class GeneratorKind:
    """How generators of one sort are opened.

    Attributes:
        open: opens one.
        checkpoints: images seen of the checkpoints that a source keeps, ascending; empty where it
            has one set of weights. Raises `NoCheckpointYet` where there will be some.
    """

    open: Callable[[Wanted], DrawsPictures]
    checkpoints: Callable[[str], list[int]] = lambda source: []


GENERATORS: Registry[GeneratorKind] = Registry(
    "generator", "etude.evaluation.planned", "etude.generators"
)


def generator(name: str, checkpoints: Callable[[str], list[int]] = lambda source: []) -> Callable:
    """The decorator of a function that opens a generator: Wanted -> DrawsPictures."""

    def register(opens: Callable[[Wanted], DrawsPictures]) -> Callable:
        GENERATORS.add(name, GeneratorKind(opens, checkpoints))
        return opens

    return register
