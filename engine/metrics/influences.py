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

from .moments import Moments

_BLOCK = 4096  # rows in float64 at a time


def of_frechet(
    first: torch.Tensor, second: torch.Tensor, keep_first: torch.Tensor, keep_second: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Influences (N,) and (M,) float64 of rows of features (N, D) and (M, D).

    Args:
        keep_first, keep_second: (N,) and (M,) bool, the rows whose distance is meant. Where they
            are no more than D on a side, nan for the other rows of that side.
    """
    sides, keeps = (first, second), [keep.to(first.device) for keep in (keep_first, keep_second)]
    parts = [
        Moments.of(side if bool(keep.all()) else side[keep])
        for side, keep in zip(sides, keeps, strict=True)
    ]
    known = [part.count > len(part.mean) for part in parts]
    maps = _of_full_rank(parts) if all(known) else None
    forms: list[torch.Tensor | None] = [None, None]
    if maps is None:
        maps, forms = _of_few_rows(sides, keeps, parts)
    offset = parts[0].mean - parts[1].mean
    found = []
    for sign, side, part, of_row, form in zip((1.0, -1.0), sides, parts, maps, forms, strict=True):
        psi = []
        for rows in side.split(_BLOCK):
            x = rows.to(torch.float64) - part.mean
            psi.append(2.0 * sign * (x @ offset) + x.square().sum(1))
            if of_row is not None:
                psi[-1] -= (x @ of_row).square().sum(1)
        found.append(torch.cat(psi) if form is None else torch.cat(psi) - form)
    return tuple(found)


def of_vendi(features: torch.Tensor, keep: torch.Tensor, q: float) -> torch.Tensor:
    """Influences (N,) float64 of rows (N, D) on the logarithm of the Vendi score of the kept ones.

    With K = sum x x^T / n for rows of length one, up to constants: of tr K^q, q x^T K^(q - 1) x; of
    - tr K log K, - x^T (log K) x; of the largest eigenvalue, the square along its eigenvector.
    """
    keep = keep.to(features.device)
    total = features.new_zeros((features.shape[1],) * 2, dtype=torch.float64)
    for rows, kept in zip(features.split(_BLOCK), keep.split(_BLOCK), strict=True):
        x = F.normalize(rows[kept].to(torch.float64), dim=1)
        total.addmm_(x.T, x)
    values, vectors = torch.linalg.eigh(total / keep.sum())
    return torch.cat(
        [
            _of_entropy((F.normalize(rows.to(torch.float64), dim=1) @ vectors).square(), values, q)
            for rows in features.split(_BLOCK)
        ]
    )


def _of_entropy(along: torch.Tensor, values: torch.Tensor, q: float) -> torch.Tensor:
    """Influences (B,) of rows whose squares along the eigenvectors are (B, D)."""
    if np.isinf(q):
        return -along[:, -1] / values[-1]
    there = values > 1e-12 * values[-1]
    values, along = values[there], along[:, there]
    if q == 1:
        return -(along @ values.log())
    return q / (1.0 - q) * (along @ values.pow(q - 1.0)) / values.pow(q).sum()


def _of_full_rank(parts: list[Moments]) -> list[torch.Tensor] | None:
    """Matrices (D, D) whose products with a row, squared and added, are the quadratic forms; None
    where a covariance is singular.
    """
    covariances = [part.covariance() for part in parts]
    lower, failed = torch.linalg.cholesky_ex(covariances[0])
    if bool(failed):
        return None
    values, vectors = torch.linalg.eigh(lower.T @ covariances[1] @ lower)
    if float(values[0]) <= 1e-14 * float(values[-1]):
        return None
    root = values.sqrt().sqrt()
    forward = torch.linalg.solve_triangular(lower.T, vectors * root, upper=True)
    return [forward, lower @ (vectors / root)]


def _of_few_rows(
    sides: tuple[torch.Tensor, torch.Tensor], keeps: list[torch.Tensor], parts: list[Moments]
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Such matrices (D, K) of sides with more kept rows than dimensions; of other sides the forms
    (N,) of the kept rows, nan for those that are not kept.
    """
    roots = [None if p.count <= len(p.mean) else _root(p.covariance()) for p in parts]
    factors = []
    for side, keep, part, root in zip(sides, keeps, parts, roots, strict=True):
        if root is None:
            kept = side[keep].to(torch.float64) - part.mean
            factors.append(kept.T / (part.count - 1) ** 0.5)
        else:
            factors.append(root[0] * root[1])
    left, values, right = torch.linalg.svd(factors[0].T @ factors[1], full_matrices=False)
    there = values > 1e-12 * values[0]
    values, vectors = values[there].sqrt(), (left[:, there], right.T[:, there])
    maps: list[torch.Tensor | None] = [None, None]
    forms: list[torch.Tensor | None] = [None, None]
    for place, (keep, part, root) in enumerate(zip(keeps, parts, roots, strict=True)):
        turned = vectors[place] * values
        if root is None:
            form = torch.full((len(keep),), torch.nan, dtype=torch.float64, device=keep.device)
            form[keep] = (part.count - 1) * turned.square().sum(1)
            forms[place] = form
        else:  # x = V s z, and the form is that of z = s^-1 V^T x
            maps[place] = (root[0] / root[1]) @ turned
    return maps, forms


def _root(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors (D, K) and the roots (K,) of the eigenvalues that are not zero."""
    values, vectors = torch.linalg.eigh(covariance)
    there = values > 1e-12 * values[-1]
    return vectors[:, there], values[there].sqrt()
