"""Precision, recall, density and coverage; called by evaluation/plan.py.

With r_i the distance of real i to its k-th nearest other real, s_j the same for generated j:

    precision = share of generated j inside some real ball      exists i: |x_i - y_j| < r_i
    recall    = share of real i inside some generated ball      exists j: |x_i - y_j| < s_j
    density   = number of (i, j) with |x_i - y_j| < r_i, divided by k M
    coverage  = share of real i with a generated picture in its ball

(Kynkaanniemi et al. 2019; Naeem et al. 2020.) Comparisons are strict, as in the authors' `prdc`
package. Distances come from `etude.kernels`: right to float64 and kept as float32, so that a
distance computed twice compares equal.

Only the nearest pairs are kept, never N x M: `Neighbourhoods` holds, for every row, its `keep`
nearest in its own set and the pairs that fall inside the `keep`-th radius. From these the four
values of any subset follow in time linear in N, which makes replicates for an interval cheap.
"""

from dataclasses import dataclass

import torch

from etude.kernels import nearest_neighbours, neighbour_pairs

METRICS = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Neighbours:
    """One set's own neighbours: distance (N, keep) float32 ascending and row (N, keep) int64."""

    distance: torch.Tensor
    row: torch.Tensor

    def radius(self, kept: torch.Tensor, k: int) -> torch.Tensor:
        """Distance to the k-th nearest kept row, (N,) float32; `kept` (N,) bool.

        Where fewer than k of the listed neighbours are kept the last listed distance stands in;
        `enough` makes this rarer than one row in a hundred thousand.
        """
        rank = kept[self.row].cumsum(1)
        position = (rank < k).sum(1).clamp_max(self.distance.shape[1] - 1)
        return self.distance.gather(1, position[:, None])[:, 0]


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

    @classmethod
    def of(
        cls,
        real: torch.Tensor,
        generated: torch.Tensor,
        k: int = 5,
        kept_share: float = 1.0,
    ) -> "Neighbourhoods":
        """Neighbourhoods of features (N, D) and (M, D) for subsets that keep `kept_share` of rows.

        Raises:
            ValueError: a set has no more than k rows.
        """
        if min(len(real), len(generated)) <= k:
            raise ValueError(f"k={k} neighbours need more than {k} pictures on each side")
        own_x, own_y = (
            Neighbours(*nearest_neighbours(side, k=enough(k, kept_share, len(side))))
            for side in (real, generated)
        )
        reaches = own_x.distance[:, -1], own_y.distance[:, -1]
        near_real, near_generated = (
            Pairs(*pairs) for pairs in neighbour_pairs(real, generated, *reaches)
        )
        return cls(k, own_x, own_y, near_real, near_generated)

    def values(
        self, keep_real: torch.Tensor | None = None, keep_generated: torch.Tensor | None = None
    ) -> dict[str, float]:
        """The four values of the kept rows; (N,) and (M,) bool, all rows without them."""
        device = self.real.row.device
        n, m = len(self.real.row), len(self.generated.row)
        kept_x = torch.ones(n, dtype=torch.bool) if keep_real is None else keep_real
        kept_y = torch.ones(m, dtype=torch.bool) if keep_generated is None else keep_generated
        kept_x, kept_y = kept_x.to(device), kept_y.to(device)
        inside = self._inside(self.near_real, self.real.radius(kept_x, self.k), kept_x, kept_y, 0)
        beside = self._inside(
            self.near_generated, self.generated.radius(kept_y, self.k), kept_x, kept_y, 1
        )
        count_x, count_y = int(kept_x.sum()), int(kept_y.sum())
        return {
            "precision": len(inside[1].unique()) / count_y,
            "recall": len(beside[0].unique()) / count_x,
            "density": len(inside[0]) / (self.k * count_y),
            "coverage": len(inside[0].unique()) / count_x,
        }

    @staticmethod
    def _inside(
        pairs: Pairs, radius: torch.Tensor, kept_x: torch.Tensor, kept_y: torch.Tensor, owner: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept pairs inside the ball of their owner (0: the real row, 1: the generated row)."""
        centre = pairs.generated if owner else pairs.real
        hit = kept_x[pairs.real] & kept_y[pairs.generated] & (pairs.distance < radius[centre])
        return pairs.real[hit], pairs.generated[hit]


def prdc(real: torch.Tensor, generated: torch.Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of features (N, D) and (M, D)."""
    return Neighbourhoods.of(real, generated, k).values()


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
