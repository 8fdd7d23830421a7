"""The kernel Inception distance, unbiased and over all pairs; called by evaluation/plan.py.

    k(x, y) = (x . y / D + 1)^3
    KID = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean k(x_i, y_j)

(Binkowski et al. 2018.) It is unbiased at any n and may be slightly negative. Usual tools average
100 random subsets of 1,000; here every pair counts once, block by block, so the value has no
subset noise. Subset replicates for an interval come from the same single pass over the blocks.
"""

import torch


def kid(first: torch.Tensor, second: torch.Tensor, block: int = 2048) -> float:
    """The unbiased KID of features (N, D) and (M, D), multiplied by nothing."""
    keep = torch.ones(1, len(first), dtype=torch.bool), torch.ones(1, len(second), dtype=torch.bool)
    return float(kid_of_subsets(first, second, *keep, block=block)[0])


def kid_of_subsets(
    first: torch.Tensor,
    second: torch.Tensor,
    keep_first: torch.Tensor,
    keep_second: torch.Tensor,
    block: int = 2048,
) -> torch.Tensor:
    """The unbiased KID of R pairs of subsets, (R,) float64.

    Args:
        keep_first, keep_second: (R, N) and (R, M) bool, the rows of each subset; at least two rows
            in each.
    """
    one, two = (side.to(torch.float64) for side in (first, second))
    mask_1, mask_2 = (
        keep.to(device=one.device, dtype=torch.float64) for keep in (keep_first, keep_second)
    )
    n, m = mask_1.sum(1), mask_2.sum(1)
    within_1 = _within(one, mask_1, block) / (n * (n - 1))
    within_2 = _within(two, mask_2, block) / (m * (m - 1))
    across = _sums(one, two, mask_1, mask_2, block) / (n * m)
    return within_1 + within_2 - 2.0 * across


def _within(x: torch.Tensor, mask: torch.Tensor, block: int) -> torch.Tensor:
    """Sums of k over ordered pairs of different rows of each subset."""
    diagonal = (x.square().sum(1) / x.shape[1] + 1.0) ** 3
    return _sums(x, x, mask, mask, block) - mask @ diagonal


def _sums(
    x: torch.Tensor, y: torch.Tensor, mask_x: torch.Tensor, mask_y: torch.Tensor, block: int
) -> torch.Tensor:
    """mask_x k(x, y) mask_y^T row by row of the masks; no more than `block` rows of k at a time."""
    total = torch.zeros(len(mask_x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), block):
        rows = slice(start, start + block)
        kernel = (x[rows] @ y.T / x.shape[1] + 1.0) ** 3
        total += (mask_x[:, rows] * (mask_y @ kernel.T)).sum(1)
    return total
