"""Pairs of a real and a generated row inside a ball, counted for many subsets; called by prdc.py.

Two ways to the same counts. Where the sets are alike few pairs are near, and each is looked up in
every subset. Where one set has collapsed or is spread much wider, balls hold most of the other set:
a list of pairs would have a million entries for a thousand rows a side, times the subsets. There a
pair only keeps its level, the number of its owner's listed neighbours that are no further than the
other row. It is inside the owner's ball in a subset where its level is at most the place of the
k-th kept neighbour, so counts of all subsets are matrix products, one a level:

    sum over l of [level = l] @ (kept owner and place >= l),     [level = l] @ kept.
"""

from collections.abc import Iterator

import torch

_MOST = 1_000_000  # pairs times subsets at a time


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


def hits_of_levels(
    level: torch.Tensor,
    place: torch.Tensor,
    kept_owner: torch.Tensor,
    kept_other: torch.Tensor,
    sure: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs inside the owner's ball of every owner (A, R) and of every other row (B, R), int32.

    Args:
        level: (A, B), of every pair.
        place: (A, R), of the k-th kept neighbour in its owner's list.
        kept_owner, kept_other: (A, R) and (B, R) bool.
        sure: the least place that there can be, k - 1: smaller levels are inside in every subset.
    """
    of_owner = torch.zeros_like(place, dtype=torch.int32)
    of_other = torch.zeros_like(kept_other, dtype=torch.int32)
    others = kept_other.float()
    with torch.autocast(level.device.type, enabled=False):  # float32 holds counts below 2^24
        for number in range(sure, int(place.max()) + 1):
            pairs = (level <= sure if number == sure else level == number).float()
            owners = kept_owner & (place >= number)
            of_owner += (pairs @ others).int() * owners
            of_other += (pairs.T @ owners.float()).int()
    return of_owner, of_other * kept_other
