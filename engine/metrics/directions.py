"""Rows that are compared by their direction alone; called by the Vendi score and CMMD."""

import torch

_SHORTEST = 1e-12  # of a row; torch's normalize does not bring shorter ones to length one


def apart(*sides: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Features (N, D) whose rows all have a direction: of one width, D or D + 1.

    A row of zeros, as of a black picture's pixels, has none: a kernel of it with itself would not
    be 1. Where there are some, one more dimension is theirs: normalised, such rows are like each
    other and unlike all the rest.
    """
    lengths = [torch.linalg.vector_norm(side, dim=1, dtype=torch.float64) for side in sides]
    zero = [length < _SHORTEST for length in lengths]
    if not any(bool(rows.any()) for rows in zero):
        return sides
    return tuple(
        torch.cat([side, rows[:, None].to(side)], dim=1)
        for side, rows in zip(sides, zero, strict=True)
    )
