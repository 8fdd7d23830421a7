"""How well a picture shows its prompt: one score for each (picture, prompt); called by evaluation/.

A scorer looks at generated pictures alone, has no reference, and keeps the score of every picture,
so that groups, intervals and galleries need no second pass. A new scorer is one file in this
folder, or anywhere, with a class under `@scorer("name")`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch

from etude.core.config import Config
from etude.core.errors import UserError
from etude.core.registry import Registry

from ..checked import options_of
from .questions import Answer, Asked, Question

__all__ = ["SCORERS", "Answer", "Asked", "Question", "Scorer", "open_scorer", "scorer"]

Images = torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray]


class Scorer(Protocol):
    """Scores of pairs of picture and prompt.

    Attributes:
        name: as it is registered.
        version: changes whenever the numbers do.
        weights_sha256: over all files that fix the numbers.
        needs: "picture", or the features that it takes instead ("clip").
        figures: names of what it gives; each is the mean of its scores.
        better, at_least, at_most: which side of a figure is the good one, and its range.
        Options: the section of a recipe that holds its options; `options` is one of these.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    needs: ClassVar[str]
    figures: ClassVar[tuple[str, ...]]
    better: ClassVar[Literal["higher"]]
    at_least: ClassVar[float]
    at_most: ClassVar[float]
    Options: ClassVar[type[Config]]
    options: Config

    @property
    def weights_sha256(self) -> str: ...

    def score(self, pictures: Any, prompts: Sequence[Asked]) -> dict[str, torch.Tensor]:
        """Figure -> (B,) float32 on the CPU, of picture i with prompt i.

        Args:
            pictures: uint8 (B, H, W, C), or a list of uint8 (H, W, C), with C of 1 or 3; or the
                features (B, D) that the scorer `needs`.
        """
        ...


SCORERS: Registry[Any] = Registry("scorer", "etude.metrics.alignment", "etude.scorers")
scorer = SCORERS.named


def open_scorer(
    name: str,
    *,
    extractor: Any = None,
    device: torch.device | str = "cpu",
    options: Config | Mapping[str, Any] | None = None,
) -> Scorer:
    """The scorer `name`.

    Args:
        extractor: for a scorer that needs features: what gave them, with `text(list[str])`, the
            embeddings (n, D) of texts.
        device: where a scorer that needs pictures runs its own network.
        options: of the scorer, as its `Options` or as plain values.

    Raises:
        UserError: there is no such scorer, an option is wrong, or weights are missing or wrong.
    """
    made = SCORERS.get(name)
    given = options
    if not isinstance(options, Config):
        given = options_of(made.Options, name, options or {})
    if made.needs == "picture":
        return made(given, device)
    if extractor is None:
        raise UserError(f"{name} takes {made.needs} features: name that extractor and its weights")
    return made(given, extractor)


def as_pictures(images: Images, prompts: Sequence[Asked]) -> list[np.ndarray]:
    """The pictures one by one, (H, W, 1 or 3) uint8, as many as prompts."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts")
    found = [
        image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
        for image in images
    ]
    for image in found:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise ValueError(
                f"pictures must be uint8 (H, W, 1 or 3), got {image.dtype} {image.shape}"
            )
    return found


def texts_of(prompts: Sequence[Asked], name: str) -> list[str]:
    """The prompts' texts.

    Raises:
        UserError: a prompt has none.
    """
    for prompt in prompts:
        if not prompt.text.strip():
            raise UserError(f"prompt {prompt.id!r} has no text: leave {name} out, or give it one")
    return [prompt.text for prompt in prompts]
