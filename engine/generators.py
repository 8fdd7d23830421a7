"""The generators of a plan that Etude has itself: runs, published checkpoints, Stable Diffusion.

Imported by planning.py before a plan runs, for the registration alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from etude.core.errors import UserError
from etude.diffusion.captured import CapturedSteps
from etude.diffusion.steps import SamplerConfig
from etude.evaluation.generators import DrawsPictures, NoCheckpointYet, Wanted, generator

from .published import is_published
from .sampling import Generator, checkpoints_of, open_generator
from .stable_diffusion import encoded, is_stable_diffusion, text_encoders


def checkpoints(source: str) -> list[int]:
    """Images seen of a run's checkpoints; none for one set of weights."""
    if is_published(source) or is_stable_diffusion(source):
        return []
    try:
        found = checkpoints_of(source)
    except UserError as error:  # it may be trained while a plan watches
        raise NoCheckpointYet(f"{error}, or add --watch to wait for it") from None
    if not found:
        raise NoCheckpointYet(f"{source} has no complete checkpoint yet: train it, or add --watch")
    return found


@generator("run", checkpoints)
def run_generator(wanted: Wanted) -> DrawsPictures:
    """The generator of a run, a published DiT's folder or a Stable Diffusion folder.

    Options of the plan's model: fields of the sampler, such as {steps: 50, method: ddim}.
    """
    if not is_stable_diffusion(wanted.source):
        return _opened(wanted)
    return PromptedGenerator(wanted)


def _opened(wanted: Wanted, **named: Any) -> Generator:
    """The generator with the plan's guidance and options in its sampler."""
    opened = open_generator(
        wanted.source, weights=wanted.weights, device=wanted.device, at=wanted.checkpoint, **named
    )
    changes = dict(wanted.options)
    if wanted.guidance is not None:
        changes["guidance_scale"] = wanted.guidance
    if not changes:
        return opened
    try:
        sampler = SamplerConfig(**(opened.sampler.model_dump() | changes))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the sampler"
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"options of {wanted.source}: {where}: {said}") from None
    return replace(opened, sampler=sampler, captured=CapturedSteps(opened.model))


class PromptedGenerator:
    """A Stable Diffusion folder asked by any number of prompts, encoded `TOGETHER` at a time.

    Its networks take labels; here a label is a place in the prompts that are encoded at present.

    Args:
        wanted: its `prompts` in the order in which they will be asked for.
    """

    TOGETHER = 512
    asked_by_text = True
    classes: tuple[str, ...] = ()

    def __init__(self, wanted: Wanted) -> None:
        # Fixed texts, so that the fingerprint is that of the networks alone.
        places = [str(place) for place in range(self.TOGETHER)]
        self.generator = _opened(wanted, classes=places)
        self.name, self.fingerprint = self.generator.name, self.generator.fingerprint
        self._prompts = list(dict.fromkeys(wanted.prompts))
        self._encoders, self._zeros = text_encoders(wanted.source, self.generator.device)
        self._place: dict[str, int] = {}

    @property
    def protocol(self) -> dict[str, Any]:
        """As of any generator."""
        return self.generator.protocol

    def draw(
        self,
        indices: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int,
        captions: Sequence[str],
        positions: np.ndarray,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `Generator.draw`; the captions say what is asked for, the labels nothing."""
        if not set(captions) <= self._place.keys():
            self._encode(captions)
        places = np.array([self._place[caption] for caption in captions], np.int64)
        return self.generator.draw(indices, places, seed=seed, positions=positions)

    def _encode(self, captions: Sequence[str]) -> None:
        """Put these prompts, and those that will be asked for next, in the place of labels."""
        first = self._prompts.index(captions[0]) if captions[0] in self._prompts else 0
        coming = self._prompts[first:] + self._prompts[:first]
        chosen = list(dict.fromkeys([*captions, *coming]))[: self.TOGETHER]
        padded = chosen + [""] * (self.TOGETHER - len(chosen))
        text, pooled = encoded(self._encoders, padded, zeros=self._zeros)
        model = self.generator.model
        model.text.copy_(text)
        if model.pooled is not None:
            model.pooled.copy_(pooled)
        self._place = {prompt: place for place, prompt in enumerate(chosen)}
