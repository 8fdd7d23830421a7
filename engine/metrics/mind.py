"""MIND: the sliced Wasserstein distance of Inception features; called by evaluation/.

    MIND = 3 D mean over directions u of W_2^2( u . x_i, u . y_j )

(Berthet et al. 2026, "MIND: Monge Inception Distance for Generative Models Evaluation"; the
definition of torch-fidelity.) The directions are uniform on the sphere: normals by position,
divided by their length, so they are the same in every comparison. In one dimension the optimal plan
joins equal quantiles: for sets of one size the sorted numbers, pair by pair; for sets of different
sizes each sorted number stands for its share of the mass, and no rows are left out.

It compares whole marginal distributions, not two moments. Sorting is done once per direction;
subsets take their rows from the sorted order.
"""

from functools import lru_cache

import numpy as np
import torch

from etude.core.config import Config, option
from etude.core.rng import Stream, normal

from .checked import check_features, options_of
from .registry import Pair, Values, metric

_BLOCK, _ROWS = 64, 4096  # directions, and rows in float64, at a time


class MindOptions(Config):
    """Options of MIND."""

    directions: int = option(1000, "random directions", ge=1)


def mind(first: torch.Tensor, second: torch.Tensor, directions: int = 1000) -> float:
    """MIND of features (N, D) and (M, D)."""
    options = options_of(MindOptions, "mind", {"directions": directions})
    check_features(first=first, second=second)
    keep = torch.ones(1, len(first), dtype=torch.bool), torch.ones(1, len(second), dtype=torch.bool)
    return float(mind_of_subsets(first, second, *keep, options.directions)[0])


def mind_of_subsets(
    first: torch.Tensor,
    second: torch.Tensor,
    keep_first: torch.Tensor,
    keep_second: torch.Tensor,
    directions: int,
) -> torch.Tensor:
    """MIND of R pairs of subsets, (R,) float64.

    Args:
        keep_first, keep_second: (R, N) and (R, M) bool, the rows of each subset.
    """
    dim = first.shape[1]
    masks = keep_first.to(first.device), keep_second.to(first.device)
    total = torch.zeros(len(keep_first), dtype=torch.float64, device=first.device)
    for start in range(0, directions, _BLOCK):
        along = sphere(np.arange(start, min(start + _BLOCK, directions)), dim).to(first.device)
        sides = [_sorted(side, along) for side in (first, second)]
        for number, keep in enumerate(zip(*masks, strict=True)):
            one, two = (_kept(*side, mask) for side, mask in zip(sides, keep, strict=True))
            total[number] += squared_wasserstein(one, two).sum()
    return 3.0 * dim * total / directions


def sphere(positions: np.ndarray, dim: int) -> torch.Tensor:
    """Directions (B, D) float64 of length one, by their positions."""
    drawn = normal(0, Stream.DIRECTION, positions, (dim,)).to(torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def squared_wasserstein(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """W_2^2 of B pairs of ascending numbers (B, N) and (B, M) in one dimension, (B,)."""
    n, m = first.shape[1], second.shape[1]
    if n == m:
        return (first - second).square().mean(1)
    one, two, lengths = (part.to(first.device) for part in _steps(n, m))
    return (first[:, one] - second[:, two]).square() @ lengths.to(first)


@lru_cache(maxsize=4)
def _steps(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where both quantile functions are constant: places in either, and lengths float64."""
    # They change at these ends, in units of 1 / (n m); halves all have the same numbers.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype)).double() / (n * m)
    return (ends - 1) // m, (ends - 1) // n, lengths


def _sorted(side: torch.Tensor, along: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending projections (B, N) float64 and the rows they come from."""
    parts = [along @ rows.to(torch.float64).T for rows in side.split(_ROWS)]
    return torch.sort(torch.cat(parts, dim=1), dim=1)


def _kept(values: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The projections of the kept rows, still ascending."""
    return values if bool(mask.all()) else values[mask[rows]].view(len(values), -1)


@metric(
    "mind", features="inception", better="lower", kind="distance", at_least=0.0, options=MindOptions
)
def monge(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """MIND, or the like distance of other features, of R pairs of subsets."""
    options = pair.options_as(MindOptions)
    found = mind_of_subsets(pair.real, pair.generated, real, generated, options.directions)
    name = "MIND" if pair.features == "inception" else f"Monge distance ({pair.features} features)"
    return {name: found.cpu().numpy()}
