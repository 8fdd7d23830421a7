"""Pairs of a real and a generated row inside a ball, counted for many subsets; called by prdc.py.

Two ways to the same counts. Where the sets are alike few pairs are near, and each is looked up in
every subset. Where one set has collapsed or is spread much wider, balls hold most of the other set:
a list of pairs would have a million entries for a thousand rows a side, times the subsets. There a
pair only keeps its level, the number of its owner's listed neighbours that are no further than the
other row. It is inside the owner's ball in a subset where its level is at most the place of the
k-th kept neighbour, so counts of all subsets are matrix products, one a level:

    sum over l of [level = l] @ (kept owner and place >= l),     [level = l] @ kept.

Levels that are inside in every subset are one product. Of the others, which the farther listed
neighbours part, there are few where sets are far from alike, and these pairs are looked up again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_MOST = 1_000_000  # pairs times subsets at a time
_COLUMNS = 8  # rows times subsets of a product are so many times `_MOST`
_LISTED = 0.1  # share of pairs, up to which looking them up is less than a product a level


class Hits:
    """How many pairs inside a ball each real and each generated row has, per subset.

    Attributes:
        of_real: (N, R) int32.
        of_generated: (M, R) int32.
    """

    def __init__(self, n: int, m: int, subsets: int, device: torch.device) -> None:
        self.of_real = torch.zeros(n, subsets, dtype=torch.int32, device=device)
        self.of_generated = torch.zeros(m, subsets, dtype=torch.int32, device=device)

    def add(self, i: torch.Tensor, j: torch.Tensor, some: slice, hit: torch.Tensor) -> None:
        """Pairs of rows (P,) and (P,), of which `hit` (P, R) are inside in the subsets `some`."""
        hit = hit.int()
        self.of_real[:, some].index_add_(0, i, hit)
        self.of_generated[:, some].index_add_(0, j, hit)

    @property
    def pairs(self) -> torch.Tensor:
        """How many pairs are inside, (R,) float64."""
        return self.of_real.sum(0).double()

    @property
    def real(self) -> torch.Tensor:
        """How many real rows have a pair inside, (R,) float64."""
        return (self.of_real > 0).sum(0).double()

    @property
    def generated(self) -> torch.Tensor:
        """How many generated rows have one, (R,) float64."""
        return (self.of_generated > 0).sum(0).double()


def few_subsets(pairs: int, subsets: int) -> Iterator[slice]:
    """Slices of the subsets, so that pairs, or rows, times subsets stay few at a time."""
    size = max(1, _MOST // max(pairs, 1))
    return (slice(start, start + size) for start in range(0, subsets, size))


@dataclass(frozen=True)
class Totals:
    """What is left of `Hits` where blocks of rows are counted for good, (R,) float64 each."""

    pairs: torch.Tensor
    real: torch.Tensor
    generated: torch.Tensor


def hits_of_levels(
    level: torch.Tensor,
    place: torch.Tensor,
    kept_owner: torch.Tensor,
    kept_other: torch.Tensor,
    sure: int,
    *,
    owners_too: bool = True,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Pairs inside the owner's ball of every owner (A, r) and of every other row (B, r), float32,
    for r subsets after another.

    Args:
        level: (A, B), of every pair.
        place: (A, R), of the k-th kept neighbour in its owner's list.
        kept_owner, kept_other: (A, R) and (B, R) bool.
        sure: the least place that there can be, k - 1: smaller levels are inside in every subset.
        owners_too: False leaves the owners' at 0.
    """
    numbers = range(sure, int(place.max()) + 1)
    between = (level > sure) & (level < numbers.stop)
    listed = int(between.sum()) <= _LISTED * level.numel()
    if listed:  # a product a level would be of nearly empty matrices
        i, j = between.nonzero(as_tuple=True)
        at, numbers = level[i, j, None], numbers[:1]
    certain = (level <= sure).float()
    for some in few_subsets(max(level.shape) // _COLUMNS, place.shape[1]):
        places, owners, others = place[:, some], kept_owner[:, some], kept_other[:, some].float()
        of_owner = torch.zeros(owners.shape, dtype=torch.float32, device=level.device)
        of_other = torch.zeros_like(others)  # float32 holds counts below 2^24
        with torch.autocast(level.device.type, enabled=False):
            for number in numbers:
                pairs = certain if number == sure else (level == number).float()
                there = (owners & (places >= number)).float()
                if owners_too:
                    of_owner += (pairs @ others) * there
                of_other.addmm_(pairs.T, there)
        of_other *= others
        for few in few_subsets(len(i), places.shape[1]) if listed else ():
            hit = (places[:, few][i] >= at) & owners[:, few][i]
            hit = hit.float() * others[:, few][j]
            if owners_too:
                of_owner[:, few].index_add_(0, i, hit)
            of_other[:, few].index_add_(0, j, hit)
        yield some, of_owner, of_other
