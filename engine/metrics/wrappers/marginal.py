"""Metrics for torchmetrics: in a MetricCollection, under DDP, with any of our extractors.

For users' own training loops; nothing of Etude imports this file.

    extractor = Extractor("inception", weights)
    metrics = MetricCollection([FrechetDistance(extractor), PrecisionRecall(extractor)])
    metrics.update(real_pictures, real=True)
    metrics.update(generated_pictures, real=False)
    metrics.compute()

Metrics that share an extractor share its forward: features of a batch are found once and kept while
the batch lives (under `torch.no_grad`; nothing can be kept of tensors of `torch.inference_mode`).
The Fréchet distance keeps moments alone, merged exactly over batches and ranks in float64; the
others keep float32 features and gather them. Shard pictures over ranks without padding: a picture
seen twice counts twice.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from etude.external.torchmetrics import Metric, dim_zero_cat

from ..frechet import frechet_distance
from ..kid import kid
from ..moments import Moments
from ..prdc import Convention, prdc
from ..remembered import remember

Extract = Callable[[Tensor], Tensor]  # uint8 (B, H, W, C) -> (B, D); an Extractor, for example


class OfFeatures(Metric):
    """A metric of the features of real and generated pictures.

    Args:
        extractor: an `Extractor`, or a function from uint8 (B, H, W, C) to features (B, D) with an
            attribute `dim`. It stays where it is: move it to the device of the pictures yourself.
        channels_last: pictures come as (B, H, W, C); else as (B, C, H, W), torchmetrics' way.
        reset_real_features: whether `reset` forgets the real side too.
        others: options of torchmetrics' own base class.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        extractor: Extract,
        *,
        channels_last: bool = False,
        reset_real_features: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        # In a tuple: a module inside would be moved, saved and copied with the metric.
        self._extractor = (extractor,)
        self.channels_last, self.reset_real_features = channels_last, reset_real_features

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) of uint8 pictures, once for all metrics with this extractor."""
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(
                f"pictures must be 4-dimensional uint8, got {tuple(images.shape)} {images.dtype}"
            )
        (extractor,) = self._extractor

        def extract() -> Tensor:
            given = images if self.channels_last else images.permute(0, 2, 3, 1)
            with torch.no_grad():
                return extractor(given)

        return remember(images, ("features", id(extractor), self.channels_last), extract)

    def reset(self) -> None:
        """Forget what was seen; the real side only with `reset_real_features`."""
        real = self.real.copy() if isinstance(self.real, list) else self.real  # a list is emptied
        super().reset()
        if not self.reset_real_features:
            self.real = real

    def __deepcopy__(self, memo: dict) -> "OfFeatures":
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        memo[id(self._extractor)] = self._extractor  # shared, so that its features still are
        made.__setstate__(deepcopy(self.__getstate__(), memo))
        return made


class FrechetDistance(OfFeatures):
    """The Fréchet distance; FID with Inception's features.

    State: count, mean and scatter of each side in one float64 vector, merged by `Moments.merge`.
    """

    higher_is_better = False

    def __init__(self, extractor: Extract, **options: Any) -> None:
        super().__init__(extractor, **options)
        empty = _packed(Moments.empty(extractor.dim))
        self.add_state("real", empty, dist_reduce_fx=_merged)
        self.add_state("generated", empty.clone(), dist_reduce_fx=_merged)

    def update(self, images: Tensor, real: bool) -> None:
        """Take in a batch of pictures."""
        name = "real" if real else "generated"
        known = getattr(self, name)
        batch = _packed(Moments.of(self.features(images))).to(known.device)
        setattr(self, name, _merged(torch.stack([known, batch])))

    def compute(self) -> Tensor:
        """The distance, a float64 scalar."""
        value = frechet_distance(_unpacked(self.real), _unpacked(self.generated))
        return torch.tensor(value, dtype=torch.float64, device=self.real.device)


class Listed(OfFeatures):
    """Keeps features, for metrics of pairs of pictures."""

    def __init__(self, extractor: Extract, **options: Any) -> None:
        super().__init__(extractor, **options)
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Take in a batch of pictures."""
        (self.real if real else self.generated).append(self.features(images))

    def sides(self) -> tuple[Tensor, Tensor]:
        """All features of both sides."""
        return dim_zero_cat(self.real), dim_zero_cat(self.generated)


class KernelDistance(Listed):
    """The unbiased kernel distance over all pairs; KID with Inception's features."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The distance, a float64 scalar."""
        real, generated = self.sides()
        return torch.tensor(kid(real, generated), dtype=torch.float64, device=real.device)


class PrecisionRecall(Listed):
    """Precision, recall, density and coverage.

    Args:
        k: neighbours that make a ball.
        convention: as in `PrdcOptions`.
    """

    higher_is_better = True

    def __init__(
        self, extractor: Extract, *, k: int = 5, convention: Convention = "prdc", **options: Any
    ) -> None:
        super().__init__(extractor, **options)
        self.k, self.convention = k, convention

    def compute(self) -> dict[str, Tensor]:
        """The four values by name, float64 scalars."""
        real, generated = self.sides()
        found = prdc(real, generated, self.k, self.convention)
        return {
            name: torch.tensor(value, dtype=torch.float64, device=real.device)
            for name, value in found.items()
        }


def _packed(moments: Moments) -> Tensor:
    """(1 + D + D^2,) float64: what ranks exchange must be one tensor, to be merged as one."""
    count = moments.mean.new_full((1,), moments.count)
    return torch.cat([count, moments.mean, moments.scatter.flatten()])


def _unpacked(state: Tensor) -> Moments:
    dim = int(((4 * len(state) - 3) ** 0.5 - 1) / 2 + 0.5)
    return Moments(int(state[0]), state[1 : 1 + dim], state[1 + dim :].view(dim, dim))


def _merged(states: Tensor) -> Tensor:
    """One state of several (P, L)."""
    total = _unpacked(states[0])
    for state in states[1:]:
        total = total.merge(_unpacked(state))
    return _packed(total)
