"""What a denoiser is asked by: from a batch, or from what somebody wants drawn.

Called by training (a batch's labels, texts and control values, some dropped by chance) and by
sampling (labels or texts that are asked for, control values as stated). A control value is that of
the augmentation which really happened to the picture, also where latents were cached, or a number
that is stored with every picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from etude.core import rng
from etude.core.errors import UserError
from etude.core.recipe_tree import nearest
from etude.data.loader import Batch
from etude.diffusion.samplers import SamplerConfig
from etude.models.conditioning import ConditioningConfig

# What an augmentation leaves behind, as a batch names it.
GEOMETRY = ("crop_top", "crop_left", "crop_height", "crop_width", "height", "width", "flip")
# What follows from it: aspect is the stored picture's height over its width.
DERIVED: dict[str, Callable[[Mapping[str, Tensor], int], Tensor]] = {
    "aspect": lambda control, side: control["height"] / control["width"],
    "target_height": lambda control, side: torch.full_like(control["height"], side),
    "target_width": lambda control, side: torch.full_like(control["width"], side),
}
# Texts -> features: text (n, L, d), text_lengths (n,), and pooled (n, p) where the model has it.
Features = Callable[[Sequence[str]], dict[str, Tensor]]


def check_guidance(sampler: SamplerConfig, conditioning: ConditioningConfig) -> None:
    """A scale for control values needs a model that has some; else raises `UserError`."""
    if len(sampler.guidance_weights) > 1 and not conditioning.control:
        raise UserError(
            "sampler.control_scale has no effect on a model without control values: leave it out,"
            " or name them in model.conditioning.control"
        )


@dataclass(frozen=True)
class Conditions:
    """Makes the `condition` of a denoiser (see `models/denoiser.py`).

    Attributes:
        config: what the model is asked by.
        num_classes: the label that means no class.
        image_size: side of the training pictures, in pixels.
        device: where the tensors go.
        features: from texts to their features, for a model that is asked by text.
        scalars: numbers that are stored with every training picture (`ShardSet.scalars`) and their
            means, which are asked for where nobody states a value.
    """

    config: ConditioningConfig
    num_classes: int
    image_size: int
    device: torch.device
    features: Features | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [*GEOMETRY, *DERIVED, *self.scalars]
        for control in self.config.control:
            if control.name not in known:
                near = nearest(control.name, known)
                hint = f"did you mean {near}?" if near else f"give one of {', '.join(known)}"
                raise UserError(
                    f"not every picture has a control value {control.name!r}: {hint}, or store a"
                    " number of that name in every sample's .json"
                )
        if self.config.semantic == "text" and self.features is None:
            raise UserError("a model asked by text needs a text encoder: set text.encoders")

    def of_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Everything the batch is known by, nothing dropped."""
        if self.config.semantic == "class":
            found = {"labels": self._labels(batch.labels)}
        else:
            found = self._text(batch.captions, batch.text)
        return found | self._control(batch.control)

    def dropped(
        self, seed: int, positions: np.ndarray, semantic: float, control: float, *, turn: int = 0
    ) -> dict[str, Tensor]:
        """Which rows lose their semantic and their control condition, independent of each other.

        Args:
            semantic, control: shares of the rows.
            turn: 0, 1, ...: draws of several passes over one batch.
        """
        streams = {"drop_semantic": (rng.Stream.DROP_SEMANTIC, semantic)}
        if self.config.control:
            streams["drop_control"] = (rng.Stream.DROP_CONTROL, control)
        found = {}
        for name, (stream, share) in streams.items():
            values = rng.uniform(seed, stream, positions, turn + 1)[:, turn]
            found[name] = torch.as_tensor(values < share, device=self.device)
        return found

    def noise(self, condition: Mapping[str, Tensor], seed: int, positions: np.ndarray) -> dict:
        """The noise of noisy replicate padding, by position."""
        if self.config.semantic != "text" or self.config.text_padding != "noisy_replicate":
            return {}
        shape = tuple(condition["text"].shape[1:])
        return {
            "text_noise": rng.normal(seed, rng.Stream.TEXT_NOISE, positions, shape, self.device)
        }

    def asked(
        self,
        labels: np.ndarray,
        captions: Sequence[str] = (),
        control: Mapping[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """What somebody wants drawn: labels (n,) or n texts, and control values.

        A control value that is not stated is that of a whole, upright picture of the training size;
        an aspect follows from the height and width, and a scalar is the training pictures' mean.
        """
        count = len(labels)
        if self.config.semantic == "class":
            found = {"labels": self._labels(torch.as_tensor(labels, dtype=torch.int64))}
        else:
            found = self._text(captions)
        side, stated = float(self.image_size), dict(control or {})
        plain = dict(self.scalars) | dict.fromkeys(GEOMETRY, 0.0)
        plain |= dict.fromkeys(("crop_height", "crop_width", "height", "width"), side)
        for name in stated:
            if name not in [c.name for c in self.config.control]:
                names = ", ".join(c.name for c in self.config.control) or "none"
                raise UserError(f"the model has no control {name!r}; it has {names}")
        given = {name: torch.full((count,), float(value)) for name, value in stated.items()}
        values = {name: torch.full((count,), value) for name, value in plain.items()} | given
        values = self._columns(values) | given
        kept = torch.zeros(count, dtype=torch.bool, device=self.device)
        if self.config.semantic == "text":
            found["drop_semantic"] = kept
        if self.config.control:
            found |= self._stacked(values) | {"drop_control": kept}
        return found

    def without(
        self, condition: Mapping[str, Tensor], *, semantic: bool = True, control: bool = False
    ) -> dict[str, Tensor]:
        """What `asked` gave with one part, or both, left out: what guidance contrasts with."""
        found = dict(condition)
        if semantic and "labels" in found:
            found["labels"] = torch.full_like(found["labels"], self.num_classes)
        elif semantic:
            found["drop_semantic"] = torch.ones_like(found["drop_semantic"])
        if control and self.config.control:
            found["drop_control"] = torch.ones_like(found["drop_control"])
        return found

    def nulls(self, condition: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What guidance contrasts with: without class or text, and then without control too."""
        found = [self.without(condition)]
        return [*found, self.without(condition, control=True)] if self.config.control else found

    def _labels(self, labels: Tensor) -> Tensor:
        """Labels on the device; -1, a picture without one, means no class."""
        labels = labels.to(self.device)
        return torch.where(labels < 0, self.num_classes, labels)

    def _text(
        self, captions: Sequence[str], ready: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        assert self.features is not None
        found = ready or self.features(captions)
        return {name: value.to(self.device) for name, value in found.items()}

    def _control(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._stacked(self._columns(values)) if self.config.control else {}

    def _columns(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        side = self.image_size
        return dict(values) | {name: rule(values, side) for name, rule in DERIVED.items()}

    def _stacked(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        columns = [values[control.name].float() for control in self.config.control]
        return {"control": torch.stack(columns, dim=1).to(self.device)}
