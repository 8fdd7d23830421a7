"""Precision, recall, density and coverage; called by evaluation/.

With r_i the distance of real i to its k-th nearest other real, s_j the same for generated j:

    precision = share of generated j inside some real ball      exists i: |x_i - y_j| < r_i
    recall    = share of real i inside some generated ball      exists j: |x_i - y_j| < s_j
    density   = number of (i, j) with |x_i - y_j| < r_i, divided by k M
    coverage  = share of real i with a generated picture in its ball

(Kynkaanniemi et al. 2019; Naeem et al. 2020.) Comparisons are strict, as in the authors' `prdc`
package; by torch-fidelity's convention a picture on the edge of a ball is inside. There the k-th
neighbour is the (k+1)-th with the picture itself, which is the same radius. Distances come from
`etude.kernels`: right to float64 and kept as float32, so that a distance computed twice compares
equal.

Only the nearest pairs are kept: `Neighbourhoods` holds, for every row, its `keep` nearest in its
own set and the pairs that fall inside the `keep`-th radius. From these the four values of any
subset follow, in time linear in the pairs, which makes replicates for an interval cheap. The pairs
are few where the sets are alike; where one is spread much wider than the other, or has collapsed,
its balls hold most of the other set, and the pairs come near N x M.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from etude.core.config import Config, option
from etude.kernels import nearest_neighbours, neighbour_pairs

from .registry import Pair, Values, metric
from .remembered import remember

Convention = Literal["prdc", "torch-fidelity"]
METRICS = ("precision", "recall", "density", "coverage")
_MOST = 4_000_000  # pairs times subsets at a time


@dataclass(frozen=True)
class Neighbours:
    """One set's own neighbours: distance (N, keep) float32 ascending and row (N, keep) int64."""

    distance: torch.Tensor
    row: torch.Tensor

    def radius(self, kept: torch.Tensor, k: int) -> torch.Tensor:
        """Distance to the k-th nearest kept row, (N,) float32; `kept` (N,) bool."""
        return self.radii(kept[:, None], k)[:, 0]

    def radii(self, kept: torch.Tensor, k: int) -> torch.Tensor:
        """The same of R subsets at once, (N, R); `kept` (N, R) bool.

        Where fewer than k of the listed neighbours are kept the last listed distance stands in;
        `enough` makes this rarer than one row in a hundred thousand.
        """
        rank = torch.zeros(self.row.shape[0], kept.shape[1], dtype=torch.int16, device=kept.device)
        position = torch.zeros_like(rank)
        for listed in self.row.T:
            rank += kept[listed]
            position += rank < k
        position = position.long().clamp_max(self.distance.shape[1] - 1)
        return self.distance.gather(1, position)


@dataclass(frozen=True)
class Pairs:
    """Cross pairs (real, generated, distance), each (P,)."""

    real: torch.Tensor
    generated: torch.Tensor
    distance: torch.Tensor


@dataclass(frozen=True)
class Neighbourhoods:
    """All that precision, recall, density and coverage of any subset need; O(keep) per row."""

    k: int
    real: Neighbours
    generated: Neighbours
    near_real: Pairs  # pairs closer than the real row's last listed neighbour
    near_generated: Pairs  # pairs closer than the generated row's last listed neighbour
    closed: bool = False  # whether the edge of a ball belongs to it

    @classmethod
    def of(
        cls,
        real: torch.Tensor,
        generated: torch.Tensor,
        k: int = 5,
        kept_share: float = 1.0,
        convention: Convention = "prdc",
    ) -> "Neighbourhoods":
        """Neighbourhoods of features (N, D) and (M, D) for subsets that keep `kept_share` of rows.

        What a side has alone is kept for the next comparison with that side.

        Raises:
            ValueError: a set has no more than k rows.
        """
        if min(len(real), len(generated)) <= k:
            raise ValueError(f"k={k} neighbours need more than {k} pictures on each side")
        own_x, own_y = (
            own_neighbours(side, enough(k, kept_share, len(side))) for side in (real, generated)
        )
        closed = convention == "torch-fidelity"
        reaches = [_edge(side.distance[:, -1], closed) for side in (own_x, own_y)]
        near_real, near_generated = (
            Pairs(*pairs) for pairs in neighbour_pairs(real, generated, *reaches)
        )
        return cls(k, own_x, own_y, near_real, near_generated, closed)

    def values(
        self, keep_real: torch.Tensor | None = None, keep_generated: torch.Tensor | None = None
    ) -> dict[str, float]:
        """The four values of the kept rows; (N,) and (M,) bool, all rows without them."""
        masks = [
            torch.ones(len(side.row), dtype=torch.bool) if keep is None else keep
            for side, keep in ((self.real, keep_real), (self.generated, keep_generated))
        ]
        found = self.values_of_subsets(*(mask[None] for mask in masks))
        return {name: float(value[0]) for name, value in found.items()}

    def values_of_subsets(self, keep_real: torch.Tensor, keep_generated: torch.Tensor) -> Values:
        """The four values, (R,) float64 each, of subsets (R, N) and (R, M) bool."""
        largest = max(
            self.near_real.real.numel(),
            self.near_generated.real.numel(),
            self.real.row.numel(),
            self.generated.row.numel(),
        )
        size = max(1, _MOST // max(largest, 1))
        blocks = [
            self._of_block(one, two)
            for one, two in zip(keep_real.split(size), keep_generated.split(size), strict=True)
        ]
        return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}

    def _of_block(self, keep_real: torch.Tensor, keep_generated: torch.Tensor) -> Values:
        device = self.real.row.device
        kept_x, kept_y = (keep.to(device).T.contiguous() for keep in (keep_real, keep_generated))
        radius_x, radius_y = (
            _edge(side.radii(kept, self.k), self.closed)
            for side, kept in ((self.real, kept_x), (self.generated, kept_y))
        )
        inside = self._inside(self.near_real, radius_x[self.near_real.real], kept_x, kept_y)
        beside = self._inside(
            self.near_generated, radius_y[self.near_generated.generated], kept_x, kept_y
        )
        n, m = len(kept_x), len(kept_y)
        count_x, count_y = kept_x.sum(0), kept_y.sum(0)
        found = {
            "precision": _touched(inside, self.near_real.generated, m) / count_y,
            "recall": _touched(beside, self.near_generated.real, n) / count_x,
            "density": inside.sum(0).double() / (self.k * count_y),
            "coverage": _touched(inside, self.near_real.real, n) / count_x,
        }
        return {name: value.double().cpu().numpy() for name, value in found.items()}

    @staticmethod
    def _inside(
        pairs: Pairs, radius: torch.Tensor, kept_x: torch.Tensor, kept_y: torch.Tensor
    ) -> torch.Tensor:
        """Which pairs are kept and inside the ball of their owner, (P, R) bool."""
        return kept_x[pairs.real] & kept_y[pairs.generated] & (pairs.distance[:, None] < radius)


def _touched(hit: torch.Tensor, row: torch.Tensor, count: int) -> torch.Tensor:
    """How many of `count` rows have a hit among the pairs (P, R) that name them, (R,) float64."""
    rows = torch.zeros(count, hit.shape[1], dtype=torch.int32, device=hit.device)
    return (rows.index_add_(0, row, hit.int()) > 0).sum(0).double()


def prdc(
    real: torch.Tensor, generated: torch.Tensor, k: int = 5, convention: Convention = "prdc"
) -> dict[str, float]:
    """Precision, recall, density and coverage of features (N, D) and (M, D)."""
    return Neighbourhoods.of(real, generated, k, convention=convention).values()


def own_neighbours(features: torch.Tensor, listed: int) -> Neighbours:
    """The `listed` nearest other rows of every row (N, D), found once while `features` live."""
    return remember(
        features,
        ("own neighbours", listed),
        lambda: Neighbours(*nearest_neighbours(features, k=listed)),
    )


def _edge(radius: torch.Tensor, closed: bool) -> torch.Tensor:
    """What distances are smaller than: a closed ball's radius is the next float32."""
    return torch.nextafter(radius, torch.full_like(radius, torch.inf)) if closed else radius


def enough(k: int, kept_share: float, count: int) -> int:
    """How many neighbours to list so that k of them stay when `kept_share` of the rows are kept.

    The number kept is nearly binomial; four standard deviations leave about one row in 100,000.
    """
    listed = k
    while listed * kept_share - 4.0 * (listed * kept_share * (1 - kept_share)) ** 0.5 < k:
        if kept_share >= 1.0 or listed >= count - 1:
            break
        listed += 1
    return min(listed, count - 1)


class PrdcOptions(Config):
    """Options of precision, recall, density and coverage."""

    k: int = option(5, "neighbours that make a ball; torch-fidelity takes 3", ge=1)
    convention: Convention = option(
        "prdc", "prdc: strictly inside a ball; torch-fidelity: on its edge too"
    )


def enough_of_prdc(options: Config, dim: int) -> tuple[int, str]:
    """Pictures among which the k-th neighbour is near."""
    k = options.k if isinstance(options, PrdcOptions) else 5
    return 20 * k, "with fewer the ball of the k-th neighbour spans a large part of the set"


@metric(
    "prdc",
    features="inception",
    better="higher",
    kind="local",
    at_least=0.0,
    options=PrdcOptions,
    enough=enough_of_prdc,
)
def neighbourhoods(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """Precision, recall, density and coverage of R pairs of subsets."""
    options = pair.options if isinstance(pair.options, PrdcOptions) else PrdcOptions()
    near = Neighbourhoods.of(
        pair.real, pair.generated, options.k, kept_share=share, convention=options.convention
    )
    return near.values_of_subsets(real, generated)
