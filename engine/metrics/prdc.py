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

Every row lists its `keep` nearest in its own set, so that k of any subset's rows are among them,
and only pairs inside the `keep`-th radius count. They are found for a block of real rows, counted
for all subsets and let go, which makes replicates for an interval cheap: memory is O(N + M) a
subset, and the pairs of one block. Those are few where the sets are alike. Where a sample of rows
says that they are not, whole sets are counted without listing pairs, and subsets by levels in
smaller blocks (hits.py).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from scipy import stats

from etude.core.config import Config, option
from etude.kernels import membership_counts, nearest_neighbours, neighbour_pairs
from etude.kernels.knn import NearPairs

from .checked import check_features, options_of
from .hits import Hits, Totals, few_subsets, hits_of_levels
from .registry import Pair, Values, metric
from .remembered import remember

Convention = Literal["prdc", "torch-fidelity"]
_ROWS = 2048  # real rows in a block of pairs
_CELLS = 2_000_000  # pairs in a block of levels
_SAMPLE, _CROWDED = 256, 0.05  # rows of either set that are asked, and which share of pairs is many


@dataclass(frozen=True)
class Neighbours:
    """Neighbours in one set of every row of that or another: distance (N, keep) float32 ascending
    and row (N, keep) int64.
    """

    distance: torch.Tensor
    row: torch.Tensor

    def radii(self, kept: torch.Tensor, k: int) -> torch.Tensor:
        """Distance to the k-th nearest kept row, (N, R) float32, of R subsets; `kept` (M, R) bool
        of the M rows that neighbours are of.
        """
        return self.distance.gather(1, self.places(kept, k))

    def places(self, kept: torch.Tensor, k: int) -> torch.Tensor:
        """Where in its list every row has its k-th kept neighbour, (N, R) int64; `kept` (M, R).

        Where fewer than k of the listed neighbours are kept the last one stands in; `enough` makes
        this rarer than one row in a hundred thousand.
        """
        shape = self.row.shape[0], kept.shape[1]
        rank = torch.zeros(shape, dtype=torch.int16, device=kept.device)
        place = torch.zeros_like(rank)
        for listed in self.row.T:
            rank += kept[listed]
            place += rank < k
        return place.long().clamp_max(self.distance.shape[1] - 1)


@dataclass(frozen=True)
class Neighbourhoods:
    """What precision, recall, density and coverage of any subset need of two sets of features."""

    k: int
    features: tuple[torch.Tensor, torch.Tensor]  # (N, D) and (M, D)
    real: Neighbours
    generated: Neighbours
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
        sides = real, generated
        if min(map(len, sides)) <= k:
            raise ValueError(f"k={k} neighbours need more than {k} pictures on each side")
        own = (own_neighbours(side, enough(k, kept_share, len(side))) for side in sides)
        return cls(k, sides, *own, closed=convention == "torch-fidelity")

    def values(
        self, keep_real: torch.Tensor | None = None, keep_generated: torch.Tensor | None = None
    ) -> dict[str, float]:
        """The four values of the kept rows; (N,) and (M,) bool, all rows without them."""
        masks = [
            torch.ones(len(side), dtype=torch.bool) if keep is None else keep
            for side, keep in zip(self.features, (keep_real, keep_generated), strict=True)
        ]
        found = self.values_of_subsets(*(mask[None] for mask in masks))
        return {name: float(value[0]) for name, value in found.items()}

    def values_of_subsets(self, keep_real: torch.Tensor, keep_generated: torch.Tensor) -> Values:
        """The four values, (R,) float64 each, of subsets (R, N) and (R, M) bool."""
        real, generated = self.features
        kept_x, kept_y = (
            keep.to(real.device).T.contiguous() for keep in (keep_real, keep_generated)
        )
        if not self._crowded:
            inside, beside = self._listed(kept_x, kept_y)
        elif bool(kept_x.all()) and bool(kept_y.all()):
            inside, beside = self._counted(kept_x.shape[1])
        else:
            inside, beside = self._levelled(kept_x, kept_y)
        count_x, count_y = kept_x.sum(0), kept_y.sum(0)
        found = {
            "precision": inside.generated / count_y,
            "recall": beside.real / count_x,
            "density": inside.pairs / (self.k * count_y),
            "coverage": inside.real / count_x,
        }
        return {name: value.cpu().numpy() for name, value in found.items()}

    @cached_property
    def _reach(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is inside a row's ball in any subset, (N,) and (M,)."""
        return tuple(_edge(side.distance[:, -1], self.closed) for side in self._sides)

    @property
    def _sides(self) -> tuple[Neighbours, Neighbours]:
        return self.real, self.generated

    @cached_property
    def _crowded(self) -> bool:
        """Whether so many pairs are near that lists of them are no use."""
        steps = [max(1, len(side) // _SAMPLE) for side in self.features]
        rows = [side[::step] for side, step in zip(self.features, steps, strict=True)]
        reach = [side[::step] for side, step in zip(self._reach, steps, strict=True)]
        near = max(len(i) for i, _, _ in neighbour_pairs(*rows, *reach))
        return near > _CROWDED * len(rows[0]) * len(rows[1])

    def _hits(self, subsets: int) -> tuple[Hits, Hits]:
        """None yet: of pairs in balls of real rows, and in balls of generated rows."""
        real, generated = self.features
        return tuple(Hits(len(real), len(generated), subsets, real.device) for _ in range(2))

    def _listed(self, kept_x: torch.Tensor, kept_y: torch.Tensor) -> tuple[Hits, Hits]:
        """Every near pair looked up in every subset; (N, R) and (M, R) bool."""
        (real, generated), (reach_x, reach_y) = self.features, self._reach
        radii = [
            _edge(side.radii(kept, self.k), self.closed)
            for side, kept in zip(self._sides, (kept_x, kept_y), strict=True)
        ]
        found, near = self._hits(kept_x.shape[1]), NearPairs(generated, reach_y)
        for start in range(0, len(real), _ROWS):
            rows = slice(start, start + _ROWS)
            lists = near.lists(real[rows], reach_x[rows])
            for owner, (hits, (i, j, distance)) in enumerate(zip(found, lists, strict=True)):
                i = i + start
                owned = (i, j)[owner]
                for some in few_subsets(len(i), kept_x.shape[1]):
                    within = distance[:, None] < radii[owner][:, some][owned]
                    hits.add(i, j, some, within & kept_x[:, some][i] & kept_y[:, some][j])
        return found

    def _counted(self, subsets: int) -> tuple[Hits, Hits]:
        """Of whole sets, `subsets` times."""
        real, generated = self.features
        radius_x, radius_y = (
            _edge(side.distance[:, self.k - 1].contiguous(), self.closed) for side in self._sides
        )
        inside, beside = self._hits(subsets)
        of_generated, of_real = membership_counts(generated, real, radius_x)
        inside.of_generated += of_generated[:, None].int()
        inside.of_real += of_real[:, None].int()
        beside.of_real += membership_counts(real, generated, radius_y)[0][:, None].int()
        return inside, beside

    def _levelled(self, kept_x: torch.Tensor, kept_y: torch.Tensor) -> tuple[Totals, Totals]:
        """By the level of every pair; (N, R) and (M, R) bool."""
        (real, generated), (reach_x, reach_y) = self.features, self._reach
        kept, near = (kept_x, kept_y), NearPairs(generated, reach_y)
        places = [side.places(k, self.k).short() for side, k in zip(self._sides, kept, strict=True)]
        edges = [_edge(side.distance, self.closed) for side in self._sides]
        sure = [edge[:, self.k - 1].contiguous() for edge in edges]
        pairs, covered, recalled = torch.zeros(
            3, kept_x.shape[1], dtype=torch.float64, device=real.device
        )
        inside = torch.zeros_like(kept_y)
        size = max(1, _CELLS // len(generated))
        for start in range(0, len(real), size):
            rows = slice(start, start + size)
            gaps = near.distances(real[rows], reach_x[rows], sure[0][rows], sure[1])
            level = torch.searchsorted(edges[0][rows], gaps[0], right=True, out_int32=True)
            for some, of_real, of_generated in hits_of_levels(
                level, places[0][rows], kept_x[rows], kept_y, self.k - 1
            ):
                pairs[some] += of_real.sum(0, dtype=torch.float64)
                covered[some] += (of_real > 0).sum(0)
                inside[:, some] |= of_generated > 0
            level = torch.searchsorted(edges[1], gaps[1].T.contiguous(), right=True, out_int32=True)
            for some, _, of_real in hits_of_levels(
                level, places[1], kept_y, kept_x[rows], self.k - 1, owners_too=False
            ):
                recalled[some] += (of_real > 0).sum(0)
        none = torch.zeros_like(pairs)
        return Totals(pairs, covered, inside.sum(0).double()), Totals(none, recalled, none)


def prdc(
    real: torch.Tensor, generated: torch.Tensor, k: int = 5, convention: Convention = "prdc"
) -> dict[str, float]:
    """Precision, recall, density and coverage of features (N, D) and (M, D)."""
    options = options_of(PrdcOptions, "prdc", {"k": k, "convention": convention})
    check_features(real=real, generated=generated)
    near = Neighbourhoods.of(real, generated, options.k, convention=options.convention)
    return near.values()


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

    The number kept is nearly binomial; fewer than k stay for less than one row in 100,000.
    """
    listed = min(k, count - 1)
    while listed < count - 1 and stats.binom.cdf(k - 1, listed, kept_share) >= 1e-5:
        listed += 1
    return listed


class PrdcOptions(Config):
    """Options of precision, recall, density and coverage."""

    k: int = option(5, "neighbours that make a ball; torch-fidelity takes 3", ge=1, le=256)
    convention: Convention = option(
        "prdc", "prdc: strictly inside a ball; torch-fidelity: on its edge too"
    )


def enough_of_prdc(options: PrdcOptions, dim: int) -> tuple[int, str]:
    """Pictures among which the k-th neighbour is near."""
    return 20 * options.k, "with fewer the ball of the k-th neighbour spans a large part of the set"


@metric(
    "prdc",
    features="inception",
    better="higher",
    kind="local",
    at_least=0.0,
    options=PrdcOptions,
    enough=enough_of_prdc,
    least=lambda options, share: options.k + 1,
)
def neighbourhoods(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """Precision, recall, density and coverage of R pairs of subsets."""
    options = pair.options_as(PrdcOptions)
    near = Neighbourhoods.of(
        pair.real, pair.generated, options.k, kept_share=share, convention=options.convention
    )
    return near.values_of_subsets(real, generated)
