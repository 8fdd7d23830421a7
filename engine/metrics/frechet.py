"""The Frechet distance of two Gaussians fitted to features; called by evaluation/plan.py.

    d^2 = |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)           (Heusel et al. 2017)

With any factors S_1 = A A^T and S_2 = B B^T the last trace is the nuclear norm of A^T B, that is
the sum of its singular values, or of the square roots of the eigenvalues of the symmetric
A^T S_2 A. Nothing here takes the square root of a non-symmetric product, so nothing turns complex.
A is a Cholesky factor when there are more rows than dimensions, and the centred rows themselves
otherwise, where the covariance is singular. All arithmetic is float64.

Only with Inception pool3 features is the number an FID. It is biased upwards by roughly a constant
over n, so two distances compare only at equal n.
"""

import warnings

import torch

from .moments import Moments


def frechet_distance(
    first: torch.Tensor | Moments, second: torch.Tensor | Moments, *, warn: bool = True
) -> float:
    """The Frechet distance of two sets of features.

    Args:
        first, second: features (N, D) of any float type, or their `Moments`.
        warn: say so when a side has fewer rows than dimensions; the distance then mostly measures
            the number of rows.
    """
    parts = [side if isinstance(side, Moments) else Moments.of(side) for side in (first, second)]
    dim = len(parts[0].mean)
    fewest = min(part.count for part in parts)
    if warn and fewest < dim:
        warnings.warn(
            f"Frechet distance of {fewest} pictures in {dim} dimensions: the covariance is "
            f"singular and the value mostly reflects the number of pictures; prefer KID",
            stacklevel=2,
        )
    one, two = parts
    offset = (one.mean - two.mean).square().sum()
    traces = (one.scatter.trace() / (one.count - 1)) + (two.scatter.trace() / (two.count - 1))
    factors = [_factor(side, part) for side, part in zip((first, second), parts, strict=True)]
    return float(offset + traces - 2.0 * _trace_root(factors, parts))


def frechet_name(extractor: str) -> str:
    """What a figure is called: FID for Inception features alone, else the features are named."""
    return "FID" if extractor == "inception" else f"Fréchet distance ({extractor} features)"


def _factor(side: torch.Tensor | Moments, part: Moments) -> torch.Tensor | None:
    """A with S = A A^T, (D, N) from few rows or (D, D) lower triangular; None where neither."""
    if part.count <= len(part.mean) and isinstance(side, torch.Tensor):
        return (side.to(torch.float64) - part.mean).T / (part.count - 1) ** 0.5
    factor, failed = torch.linalg.cholesky_ex(part.covariance())
    return None if failed else factor


def _trace_root(factors: list[torch.Tensor | None], parts: list[Moments]) -> torch.Tensor:
    """tr (S_1 S_2)^(1/2) by the cheapest stable route that the factors allow."""
    dim = len(parts[0].mean)
    if any(factor is not None and factor.shape[1] < dim for factor in factors):
        known = [
            _eigen_factor(part.covariance()) if factor is None else factor
            for factor, part in zip(factors, parts, strict=True)
        ]
        return torch.linalg.svdvals(known[0].T @ known[1]).sum()
    if factors[0] is None and factors[1] is not None:
        factors, parts = factors[::-1], parts[::-1]
    left = _eigen_factor(parts[0].covariance()) if factors[0] is None else factors[0]
    product = left.T @ parts[1].covariance() @ left
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()


def _eigen_factor(covariance: torch.Tensor) -> torch.Tensor:
    """A factor of a singular covariance, for example of features with a constant entry."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()
