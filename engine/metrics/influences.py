"""How each row moves a figure of covariances, to first order; called by figures.py through the
metrics, for intervals of figures that cost too much to be computed on many halves.

The influence of a row x on a figure F of means m_i and covariances S_i is the derivative of F as
mass is moved to x. For the Fréchet distance, with T the matrix of the optimal map from the first
Gaussian to the second (Olkin and Pukelsheim 1982),

    psi(x) = 2 (m_1 - m_2) . (x - m_1) + (x - m_1)^T (I - T) (x - m_1) + a constant,

and the same with the inverse map for rows of the second. With S_1 = L L^T and L^T S_2 L = U w U^T
both quadratic forms are squared lengths: of (U w^(1/4))^T L^-1 (x - m_1) and of
(U w^(-1/4))^T L^T (y - m_2). Where rows are no more than dimensions the forms of the rows are the
diagonals of U s U^T and V s V^T, times n - 1, for X Y^T = (n - 1) U s V^T; those of other rows are
not defined there.

Cost, for D = 2048 and N = 10,000: one Fréchet distance, eigenvectors in place of eigenvalues, and
two products of N D^2.
"""

import numpy as np
import torch
import torch.nn.functional as F


def of_frechet(
    first: torch.Tensor, second: torch.Tensor, keep_first: torch.Tensor, keep_second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Influences (N,) and (M,) float64 of rows of features (N, D) and (M, D).

    Args:
        keep_first, keep_second: (N,) and (M,) bool, the rows whose distance is meant. Where they
            are no more than D on a side, nan for the quadratic form of the other rows.
    """
    sides = [side.to(torch.float64) for side in (first, second)]
    keeps = [keep.to(first.device) for keep in (keep_first, keep_second)]
    means = [side[keep].mean(0) for side, keep in zip(sides, keeps, strict=True)]
    centred = [side - mean for side, mean in zip(sides, means, strict=True)]
    kept = [side[keep] for side, keep in zip(centred, keeps, strict=True)]
    known = [len(rows) > rows.shape[1] for rows in kept]
    forms = _of_full_rank(centred, kept) if all(known) else None
    if forms is None:
        forms = _of_few_rows(centred, kept, keeps)
    offset = means[0] - means[1]
    return tuple(
        2.0 * sign * (rows @ offset) + rows.square().sum(1) - form
        for sign, rows, form in zip((1.0, -1.0), centred, forms, strict=True)
    )


def of_vendi(features: torch.Tensor, keep: torch.Tensor, q: float) -> torch.Tensor:
    """Influences (N,) float64 of rows (N, D) on the logarithm of the Vendi score of the kept ones.

    With K = sum x x^T / n for rows of length one, up to constants: of tr K^q, q x^T K^(q - 1) x; of
    - tr K log K, - x^T (log K) x; of the largest eigenvalue, the square along its eigenvector.
    """
    x = F.normalize(features.to(torch.float64), dim=1)
    kept = x[keep.to(x.device)]
    values, vectors = torch.linalg.eigh(kept.T @ kept / len(kept))
    along = (x @ vectors).square()
    if np.isinf(q):
        return -along[:, -1] / values[-1]
    there = values > 1e-12 * values[-1]
    values, along = values[there], along[:, there]
    if q == 1:
        return -(along @ values.log())
    return q / (1.0 - q) * (along @ values.pow(q - 1.0)) / values.pow(q).sum()


def _of_full_rank(
    centred: list[torch.Tensor], kept: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both quadratic forms of all rows; None where a covariance is singular."""
    covariances = [rows.T @ rows / (len(rows) - 1) for rows in kept]
    lower, failed = torch.linalg.cholesky_ex(covariances[0])
    if bool(failed):
        return None
    values, vectors = torch.linalg.eigh(lower.T @ covariances[1] @ lower)
    if float(values[0]) <= 1e-14 * float(values[-1]):
        return None
    root = values.sqrt().sqrt()
    forward = torch.linalg.solve_triangular(lower.T, vectors * root, upper=True)
    back = lower @ (vectors / root)
    return (centred[0] @ forward).square().sum(1), (centred[1] @ back).square().sum(1)


def _of_few_rows(
    centred: list[torch.Tensor], kept: list[torch.Tensor], keeps: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Both quadratic forms of the kept rows, nan for others."""
    counts = [len(rows) - 1 for rows in kept]
    factors = [
        rows.T / count**0.5 if len(rows) <= rows.shape[1] else _root(rows.T @ rows / count)
        for rows, count in zip(kept, counts, strict=True)
    ]
    left, values, right = torch.linalg.svd(factors[0].T @ factors[1], full_matrices=False)
    there = values > 1e-12 * values[0]
    values, sides = values[there], (left[:, there], right.T[:, there])
    found = []
    for rows, keep, side, factor, every in zip(kept, keeps, sides, factors, centred, strict=True):
        form = torch.full((len(every),), torch.nan, dtype=torch.float64, device=every.device)
        if len(rows) > rows.shape[1]:
            # rows = A z: the form is that of z = A^+ x.
            side = torch.linalg.lstsq(factor, rows.T, driver="gelsd").solution.T @ side
            form[keep] = side.square() @ values
        else:
            form[keep] = (len(rows) - 1) * (side.square() @ values)
        found.append(form)
    return found


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()
