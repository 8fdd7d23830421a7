"""Metrics for torchmetrics: in a MetricCollection, under DDP, with any of our extractors.

For users' own training loops; nothing of Etude imports this file.

    from etude.metrics.wrappers.torchmetrics import FrechetDistance, PrecisionRecall

    extractor = Extractor("inception", weights)
    metrics = MetricCollection([FrechetDistance(extractor), PrecisionRecall(extractor)])
    metrics.update(real_pictures, real=True)
    metrics.update(generated_pictures, real=False)
    metrics.compute()

Metrics that share an `Extractor` share its forward: features of a batch are found once and kept
while the batch lives with the same content; one buffer may be filled again and again. The Fréchet
distance keeps moments, merged exactly over batches and ranks in float64, and few rows that are not
in them yet; the others keep float32 features and gather them. Shard pictures over ranks without
padding: a picture seen twice counts twice. A rank may lack pictures.
"""

import weakref
from collections.abc import Callable, Hashable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.external.torchmetrics import Metric, dim_zero_cat

from ..checked import options_of
from ..extractors import Extractor
from ..frechet import frechet_distance
from ..kid import kid
from ..moments import Moments
from ..prdc import Convention, PrdcOptions, prdc
from ..remembered import remember

Extract = Callable[[Tensor], Tensor]  # uint8 (B, H, W, C) -> (B, D); an Extractor, for example
# Rows that are kept before they are merged into moments: at D = 2048 a merge takes 0.25 s of a
# core however few the rows, and these take 8 MiB where the moments take 32.
_ROWS = 1024


class OfFeatures(Metric):
    """A metric of the features of real and generated pictures.

    Args:
        extractor: an `Extractor`, or a function from uint8 (B, H, W, C) to features (B, D) with an
            attribute `dim`, which every metric then calls for itself. It stays where it is: move it
            to the device of the pictures yourself.
        channels_last: pictures come as (B, H, W, C); else as (B, C, H, W), torchmetrics' way.
        reset_real_features: whether `reset` forgets the real side too.
        others: options of torchmetrics' own base class.

    Attributes:
        least: pictures of each side that `compute` needs.
    """

    is_differentiable = False
    full_state_update = False
    least = 2

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
        """Features (B, D) of uint8 pictures, once for all metrics with this `Extractor`.

        Raises:
            UserError: other types or shapes.
        """
        (extractor,) = self._extractor
        self._check_pictures(images, isinstance(extractor, Extractor))

        def extract() -> Tensor:
            given = images if self.channels_last else images.permute(0, 2, 3, 1)
            with torch.no_grad():
                return extractor(given)

        weights = _weights(extractor)
        if weights is None:
            return extract()
        # By weak reference: the id of an extractor that is gone is given to another.
        key = "features", weakref.ref(extractor), self.channels_last
        known = remember(images, key, dict)  # features by weights, of the last ones alone
        if weights not in known:
            known.clear()
            known[weights] = extract()
        return known[weights]

    def _check_pictures(self, images: Tensor, strict: bool) -> None:
        """Raise `UserError` unless pictures are uint8 with their channels where they should be.

        Args:
            strict: channels are 1 or 3; a function of the user's may take others, so that for it
                pictures are refused only where the other order would fit.
        """
        right = images.dtype == torch.uint8 and images.dim() == 4
        here, there = (3, 1) if self.channels_last else (1, 3)
        if right and images.shape[here] not in (1, 3):
            right = not strict and images.shape[there] not in (1, 3)
        if not right:
            order, other = ("B, H, W, C", "B, C, H, W")[:: 1 if self.channels_last else -1]
            raise UserError(
                f"pictures must be uint8 ({order}) with 1 or 3 channels, got {images.dtype} "
                f"{tuple(images.shape)}; for ({other}) set channels_last={not self.channels_last}"
            )

    def check_side(self, side: str, count: int, bad: int) -> None:
        """Raise `UserError` where "real" or "generated" has too few pictures, or bad features.

        Looked at in `compute`, when the ranks have shared what they have: so all of them raise, and
        no batch waits for the device.

        Args:
            bad: of how many pictures features are not finite.
        """
        name = type(self).__name__
        if count < self.least:
            raise UserError(
                f"{name} needs {self.least} or more {side} pictures and has {count}; call "
                f"update(pictures, real={side == 'real'}) before compute()"
            )
        if bad:
            raise UserError(
                f"{name}: features of {bad} of {count} {side} pictures are not finite; use an "
                f"extractor of dtype='float32' and reset() the metric"
            )

    def reset(self) -> None:
        """Forget what was seen; the real side only with `reset_real_features`."""
        real = self.real.copy() if isinstance(self.real, list) else self.real  # a list is emptied
        super().reset()
        if not self.reset_real_features:
            self.real = real

    def _forward_reduce_state_update(self, *args: Any, **options: Any) -> Any:
        # Merging what `reset` kept with what was there before it would count the real side twice.
        if self.reset_real_features:
            return super()._forward_reduce_state_update(*args, **options)
        return self._forward_full_state_update(*args, **options)

    def __deepcopy__(self, memo: dict) -> "OfFeatures":
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        memo[id(self._extractor)] = self._extractor  # shared, so that its features still are
        made.__setstate__(deepcopy(self.__getstate__(), memo))
        return made


class FrechetDistance(OfFeatures):
    """The Fréchet distance; FID with Inception's features.

    State: count, rows that are not finite, mean and scatter of each side in one float64 vector,
    merged by `Moments.merge`. Up to `_ROWS` rows wait outside it: whoever reads a state, this class
    or torchmetrics, finds them merged, and a state that is written takes their place.
    """

    higher_is_better = False
    real = property(lambda self: self._read("real"), lambda self, new: self._write("real", new))
    generated = property(
        lambda self: self._read("generated"), lambda self, new: self._write("generated", new)
    )

    def __init__(self, extractor: Extract, **options: Any) -> None:
        super().__init__(extractor, **options)
        self._moments: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}
        empty = _packed(Moments.empty(extractor.dim))
        self.add_state("real", empty, dist_reduce_fx=_merged)
        self.add_state("generated", empty.clone(), dist_reduce_fx=_merged)

    def update(self, images: Tensor, real: bool) -> None:
        """Take in a batch of pictures."""
        side = "real" if real else "generated"
        rows = self._rows[side]
        rows.append(self.features(images).clone())  # an extractor may write its next ones there
        if sum(map(len, rows)) >= _ROWS:
            self._read(side)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar."""
        for side in ("real", "generated"):
            count, bad = getattr(self, side)[:2].tolist()
            self.check_side(side, int(count), int(bad))
        value = frechet_distance(_unpacked(self.real), _unpacked(self.generated))
        return torch.tensor(value, dtype=torch.float64, device=self.real.device)

    def _read(self, side: str) -> Tensor:
        if self._rows[side]:
            rows, known = torch.cat(self._rows[side]), self._moments[side]
            part = _packed(Moments.of(rows), _bad(rows)).to(known.device)
            self._write(side, _merged(torch.stack([known, part])))
        return self._moments[side]

    def _write(self, side: str, state: Tensor) -> None:
        self._moments[side], self._rows[side] = state, []


class Listed(OfFeatures):
    """Keeps features, for metrics of pairs of pictures."""

    def __init__(self, extractor: Extract, **options: Any) -> None:
        super().__init__(extractor, **options)
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Take in a batch of pictures."""
        (self.real if real else self.generated).append(self.features(images).float())

    def sides(self) -> tuple[Tensor, Tensor]:
        """All features (N, D) and (M, D) float32 of the real and the generated side."""
        found = []
        for side in ("real", "generated"):
            kept = getattr(self, side)
            rows = dim_zero_cat(kept) if len(kept) else torch.empty(0, self._extractor[0].dim)
            self.check_side(side, len(rows), int(_bad(rows)))
            found.append(rows)
        return found[0], found[1]

    def _sync_dist(self, *args: Any, **options: Any) -> None:
        # For an empty list torchmetrics gathers a vector, which matches no rank's matrix.
        device = next((rows.device for rows in [*self.real, *self.generated]), self.device)
        for side in ("real", "generated"):
            if not getattr(self, side):
                dim = self._extractor[0].dim
                empty = torch.empty(0, dim, dtype=torch.float32, device=device)
                setattr(self, side, [empty])
        super()._sync_dist(*args, **options)


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
        asked = options_of(PrdcOptions, "PrecisionRecall", {"k": k, "convention": convention})
        self.k, self.convention, self.least = asked.k, asked.convention, asked.k + 1

    def compute(self) -> dict[str, Tensor]:
        """The four values by name, float64 scalars."""
        real, generated = self.sides()
        found = prdc(real, generated, self.k, self.convention)
        return {
            name: torch.tensor(value, dtype=torch.float64, device=real.device)
            for name, value in found.items()
        }


def _weights(extractor: Extract) -> Hashable | None:
    """Equal as long as an extractor gives the same features; None where nobody can say.

    Only an `Extractor` is known to depend on its weights alone. They are told apart by their places
    and by torch's counts of changes: to forget at `reset` would miss weights that are loaded
    between two updates of a metric that goes on.
    """
    if not isinstance(extractor, Extractor):
        return None
    tensors = [*extractor.backbone.parameters(), *extractor.backbone.buffers()]
    if any(tensor.is_inference() for tensor in tensors):  # torch does not count their changes
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def _bad(rows: Tensor) -> Tensor:
    """How many rows (N, D) are not finite, a scalar on their device."""
    return (~rows.isfinite().all(1)).sum()


def _packed(moments: Moments, bad: Tensor | float = 0.0) -> Tensor:
    """(2 + D + D^2,) float64: what ranks exchange must be one tensor, to be merged as one.

    Args:
        bad: rows with features that are not finite.
    """
    counts = moments.mean.new_tensor([moments.count, 0.0])
    counts[1] = bad
    return torch.cat([counts, moments.mean, moments.scatter.flatten()])


def _unpacked(state: Tensor) -> Moments:
    dim = int(((4 * len(state) - 7) ** 0.5 - 1) / 2 + 0.5)
    return Moments(int(state[0]), state[2 : 2 + dim], state[2 + dim :].view(dim, dim))


def _merged(states: Tensor) -> Tensor:
    """One state of several (P, L)."""
    total = _unpacked(states[0])
    for state in states[1:]:
        total = total.merge(_unpacked(state))
    return _packed(total, states[:, 1].sum())
