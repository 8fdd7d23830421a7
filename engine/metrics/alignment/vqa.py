"""Questions to a model about many pictures, in batches; called by vqascore.py and dsg.py."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch

from etude.core.config import Config, option
from etude.external.transformers_vqa import Context, VisualAnswerer

T = TypeVar("T")


class VQAOptions(Config):
    """Which model answers, and how it is run."""

    weights: str = option(
        help="folder of a model of transformers: BLIP, BLIP-2, InstructBLIP or LLaVA 1.5"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of the model's weights and arithmetic"
    )
    frame: str = option(
        "", "text around a question, with {question} in its place; empty: the model's own"
    )
    batch: int = option(16, "pictures, and questions, per forward pass", gt=0, affects_result=False)


def open_answerer(options: VQAOptions, device: torch.device | str) -> VisualAnswerer:
    """The model that `options` name.

    Raises:
        UserError: its folder is missing or wrong.
    """
    return VisualAnswerer.from_folder(
        options.weights, frame=options.frame, dtype=getattr(torch, options.dtype), device=device
    )


def ask(
    answerer: VisualAnswerer,
    images: Sequence[np.ndarray],
    questions: Sequence[Sequence[str]],
    batch: int,
    reply: Callable[[Context], Sequence[T]],
) -> list[list[T]]:
    """What `reply` makes of every question of every picture.

    Each picture is prepared and seen once. Its questions share batches with those of the pictures
    beside it, so that a picture with three questions costs three rows and no padding to eight.

    Args:
        images: each (H, W, 1 or 3) uint8.
        questions: those of each picture.
        batch: most pictures, and most questions, per forward pass.
    """
    found: list[list[T]] = [[] for _ in images]
    for start in range(0, len(images), batch):
        seen = answerer.see(images[start : start + batch])
        pairs = [
            (row, text) for row, own in enumerate(questions[start : start + batch]) for text in own
        ]
        for first in range(0, len(pairs), batch):
            chunk = pairs[first : first + batch]
            rows = torch.tensor([row for row, _ in chunk], device=seen.device)
            context = answerer.read(seen[rows], [text for _, text in chunk])
            for (row, _), said in zip(chunk, reply(context), strict=True):
                found[start + row].append(said)
    return found
