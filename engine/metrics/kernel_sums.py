"""Sums of a kernel over pairs of rows of subsets, block by block; called by kid.py and cmmd.py.

Both are squared maximum mean discrepancies (Gretton et al. 2012, equations 3 and 5):

    unbiased   mean over i != j of k(x_i, x_j) + the same of y - 2 mean k(x_i, y_j)
    biased     the same with the pairs i = j counted

A block of k serves all R subsets at once: its sum over a subset is u k v^T for the rows u, v of the
masks. Beside the masks, (R, N) and (R, M) bool, memory is O(block^2 + R block). All arithmetic is
float64.
"""

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from etude.core.errors import UserError

from .remembered import remember

Kernel = Callable[[torch.Tensor], torch.Tensor]
RowsOf = Callable[[torch.Tensor, int], torch.Tensor]  # a block of rows in float64


def discrepancies(
    first: torch.Tensor,
    second: torch.Tensor,
    keep_first: torch.Tensor,
    keep_second: torch.Tensor,
    kernel: Kernel,
    *,
    name: str,
    unbiased: bool = True,
    normalise: bool = False,
    block: int = 1024,
) -> torch.Tensor:
    """Squared discrepancies of R pairs of subsets of rows (N, D) and (M, D), (R,) float64.

    Args:
        keep_first, keep_second: (R, N) and (R, M) bool, the rows of each subset; at least two in
            each.
        kernel: inner products (any shape, float64, may be overwritten) -> values of k.
        name: says which kernel this is; what one side contributes alone is kept under it for the
            next comparison with that side.
        normalise: divide every row by its length first.
    """

    def rows_of(x: torch.Tensor, start: int) -> torch.Tensor:
        rows = x[start : start + block].to(torch.float64)
        return F.normalize(rows, dim=1) if normalise else rows

    if block < 1:
        raise UserError(f"block={block} holds no rows; set it to 1 or more")
    masks = [keep.to(first.device) for keep in (keep_first, keep_second)]
    pairs = masks[0].sum(1).double() * masks[1].sum(1)
    total = -2.0 * _across(first, second, *masks, kernel, rows_of, block) / pairs
    for side, mask in zip((first, second), masks, strict=True):
        total = total + _own(side, mask, kernel, rows_of, name, unbiased, block)
    return total


def _own(
    x: torch.Tensor,
    mask: torch.Tensor,
    kernel: Kernel,
    rows_of: RowsOf,
    name: str,
    unbiased: bool,
    block: int,
) -> torch.Tensor:
    """The mean of k over pairs of rows of each subset."""
    digest = hashlib.sha256(mask.cpu().numpy().tobytes()).hexdigest()
    key = (name, tuple(mask.shape), digest)
    every, diagonal = remember(x, key, lambda: _within(x, mask, kernel, rows_of, block))
    count = mask.sum(1).double()
    return (every - diagonal) / (count * (count - 1)) if unbiased else every / count.square()


def _within(
    x: torch.Tensor, mask: torch.Tensor, kernel: Kernel, rows_of: RowsOf, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of k over all ordered pairs of each subset, and over pairs of a row with itself."""
    every = torch.zeros(len(mask), dtype=torch.float64, device=x.device)
    diagonal = torch.zeros_like(every)
    for start in range(0, len(x), block):
        rows, mask_rows = rows_of(x, start), mask[:, start : start + block].double()
        for at in range(start, len(x), block):
            columns = rows if at == start else rows_of(x, at)
            values = kernel(rows @ columns.T)
            part = _masked(values, mask_rows, mask[:, at : at + block])
            every += part if at == start else 2.0 * part  # k is symmetric
            if at == start:
                diagonal += mask_rows @ values.diagonal()
    return every, diagonal


def _across(
    x: torch.Tensor,
    y: torch.Tensor,
    mask_x: torch.Tensor,
    mask_y: torch.Tensor,
    kernel: Kernel,
    rows_of: RowsOf,
    block: int,
) -> torch.Tensor:
    """Sums of k over pairs of a row of x and one of y, of each subset."""
    total = torch.zeros(len(mask_x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), block):
        rows, mask_rows = rows_of(x, start), mask_x[:, start : start + block].double()
        for at in range(0, len(y), block):
            values = kernel(rows @ rows_of(y, at).T)
            total += _masked(values, mask_rows, mask_y[:, at : at + block])
    return total


def _masked(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """u k v^T for each pair of mask rows (R, B) float64 and (R, C) bool, (R,)."""
    return ((rows @ values) * columns).sum(1)
