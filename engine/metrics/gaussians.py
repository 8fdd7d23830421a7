"""Gaussians fitted to features, and tr (S_1 S_2)^(1/2) with its error; called by frechet.py.

With any factors S_1 = A A^T and S_2 = B B^T the trace is the nuclear norm of A^T B, the sum of its
singular values, and these are the roots of the eigenvalues of the symmetric P = A^T S_2 A. Nothing
here takes the square root of a non-symmetric product, so nothing turns complex. A is, cheapest
first: the centred rows themselves where there are no more of them than dimensions; the Cholesky
factor L, with L^T S L by blocks of columns so that L's zeros cost nothing (4/3 D^3 multiplications
where plain products take 4 D^3); eigenvectors where a singular covariance is all that is known.

How the root is certified. From a vector w of signs, |P w - A^T (S_2 (A w))| / |P w| estimates the
error of P in the Frobenius norm relative to its own (its expectation over signs is that exactly),
|A (A^T w) - S_1 w| / |S_1 w| that of a factor, and sum l = tr P with sum l^2 = |P|^2 check the
eigenvalues l. With their largest r and e = (r + u sqrt(D)) |P|, u = 2^-53, the true eigenvalues
l + d have |d| <= e (Hoffman and Wielandt 1953), so by Cauchy and Schwarz the trace is off by at
most

    e (sum over l > e of 1 / l)^(1/2) + (number of l <= e) (2 e)^(1/2)

Eigenvalues beyond the smaller rank are zero and are left out. Where this is more than `TOLERANCE`
of tr S_1 + tr S_2 the singular values of A^T B are computed, which is about four times slower and
off by D u |A^T B| at most for each; where even these do not add up there is an error.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from etude.core.rng import Stream, bits

from .moments import Moments

TOLERANCE = 1e-8
_RESIDUAL = 1e-9  # of |P| or |S|; float64 leaves about 1e-14
_BLOCK = 256
_UNIT = 2.0**-53


class Gaussian:
    """The Gaussian of a set of features; each part is made when it is first asked for.

    Attributes:
        count, mean: number of rows, and their mean (D,) float64.
        rows: (N, D) float64, centred and divided by (N - 1)^(1/2), where N <= D and they are
            known, else None.
    """

    def __init__(self, features: torch.Tensor | Moments) -> None:
        self.rows: torch.Tensor | None = None
        self._moments: Moments | None = None
        few = isinstance(features, torch.Tensor) and len(features) <= features.shape[1]
        if few:
            rows = features.to(torch.float64)
            self.count, self.mean = len(rows), rows.mean(0)
            if self.count > 1:
                self.rows = (rows - self.mean) / (self.count - 1) ** 0.5
        else:
            known = features if isinstance(features, Moments) else Moments.of(features)
            self.count, self.mean, self._moments = known.count, known.mean, known
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        if not bool(torch.isfinite(self.mean).all()):
            raise ValueError("features are not all finite: look for pictures the network overflows")

    @property
    def rank(self) -> int:
        """The largest rank that the covariance can have."""
        return min(self.count - 1, len(self.mean))

    @cached_property
    def trace(self) -> torch.Tensor:
        """tr S, a scalar."""
        if self.rows is not None:
            return self.rows.square().sum()
        return self.covariance.trace()

    @cached_property
    def covariance(self) -> torch.Tensor:
        """S, (D, D)."""
        if self._moments is None:
            return self.rows.T @ self.rows
        return self._moments.covariance()

    @cached_property
    def cholesky(self) -> torch.Tensor | None:
        """Lower triangular L with S = L L^T, or None where S is singular."""
        if self.rank < len(self.mean):
            return None
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        if bool(failed):
            return None
        w = signs(len(factor), factor)
        return factor if _defect(factor @ (factor.T @ w), self.covariance @ w) < _RESIDUAL else None

    @cached_property
    def factor(self) -> torch.Tensor:
        """A with S = A A^T, (D, K), the cheapest there is."""
        if self.rows is not None:
            return self.rows.T
        if self.cholesky is not None:
            return self.cholesky
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp_min(0).sqrt()

    def times(self, w: torch.Tensor) -> torch.Tensor:
        """S w, without the covariance where the rows are few."""
        if self.rows is not None:
            return self.rows.T @ (self.rows @ w)
        return self.covariance @ w


@dataclass(frozen=True)
class Root:
    """tr (S_1 S_2)^(1/2).

    Attributes:
        residual: largest relative defect of the factorisation that gave it.
        error: bound of the value's error from that defect and rounding.
        route: "eigenvalues", or "singular values" where those were not good enough.
    """

    value: float
    residual: float
    error: float
    route: str


def trace_root(first: Gaussian, second: Gaussian) -> Root:
    """tr (S_1 S_2)^(1/2), certified.

    Raises:
        ArithmeticError: no route gives a root that adds up.
    """
    one, two = _ordered(first, second)
    product, residual = _symmetric(one, two)
    values = torch.linalg.eigvalsh(product)
    rank = min(first.rank, second.rank, len(values))
    root = _certified(product, values, rank, residual)
    scale = float(first.trace + second.trace)
    if root.residual < _RESIDUAL and root.error <= TOLERANCE * scale:
        return root
    return _by_singular_values(one, two)


def root_of_products(products: torch.Tensor, rank: int) -> torch.Tensor:
    """Sums of the roots of the `rank` largest eigenvalues of P (R, K, K), (R,) float64."""
    values = torch.linalg.eigvalsh(products)
    return values[:, len(products[0]) - rank :].clamp_min(0).sqrt().sum(1)


def signs(count: int, like: torch.Tensor) -> torch.Tensor:
    """A fixed vector (count,) of +1 and -1 on the device of `like`."""
    words = bits(0, Stream.PROBE, [0], count)[0]
    return (torch.from_numpy((words & 1).astype("float64")) * 2 - 1).to(like.device)


def _ordered(first: Gaussian, second: Gaussian) -> tuple[Gaussian, Gaussian]:
    """The side with the cheaper factor first: few rows, then a Cholesky factor."""

    def cost(side: Gaussian) -> tuple[int, int]:
        if side.rows is not None:
            return (0, side.count)
        return (1 if "cholesky" in vars(side) and side.cholesky is not None else 2, 0)

    one, two = sorted((first, second), key=cost)
    if one.rows is None and one.cholesky is None and two.cholesky is not None:
        return two, one
    return one, two


def _symmetric(one: Gaussian, two: Gaussian) -> tuple[torch.Tensor, float]:
    """P = A^T S_2 A, (K, K) with its lower triangle valid, and its relative defect."""
    factor = one.factor
    if two.rows is not None:
        across = one.rows @ two.rows.T
        product = across @ across.T
    elif factor is one.cholesky:
        product = _by_blocks(factor, two.covariance)
    else:
        product = factor.T @ (two.covariance @ factor)
    w = signs(len(product), product)
    lower = product.tril()
    made = lower @ w + lower.T @ w - lower.diagonal() * w
    return lower, _defect(made, factor.T @ two.times(factor @ w))


def _by_blocks(lower: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The lower triangle, by blocks, of L^T S L for lower triangular L."""
    inner, made = torch.empty_like(covariance), torch.zeros_like(covariance)
    for start in range(0, len(lower), _BLOCK):
        columns = slice(start, start + _BLOCK)
        inner[:, columns] = covariance[:, start:] @ lower[start:, columns]
        end = min(start + _BLOCK, len(lower))
        # Rows of L^T from `start` on need only the columns of S L that are finished by now.
        made[columns, :end] = lower[start:, columns].T @ inner[start:, :end]
    return made


def _certified(product: torch.Tensor, values: torch.Tensor, rank: int, residual: float) -> Root:
    """The root from the eigenvalues (ascending) of P, given by its lower triangle."""
    square = 2 * product.square().sum() - product.diagonal().square().sum()
    norm = float(square) ** 0.5
    defects = _defect(values.sum(), product.trace()), _defect(values.square().sum(), square)
    residual = max(residual, *defects)
    kept = values[len(values) - rank :].clamp_min(0)
    error = (residual + _UNIT * len(values) ** 0.5) * norm
    large = kept[kept > error]
    bound = error * float((1 / large).sum()) ** 0.5 + (rank - len(large)) * (2 * error) ** 0.5
    return Root(float(kept.sqrt().sum()), residual, bound, "eigenvalues")


def _by_singular_values(one: Gaussian, two: Gaussian) -> Root:
    across = one.factor.T @ two.factor
    values = torch.linalg.svdvals(across)
    residual = _defect(values.square().sum(), across.square().sum())
    if not residual < _RESIDUAL:
        raise ArithmeticError(
            f"the root of the covariances' product is off by {residual:.1e} of its size: features "
            f"are not finite, or the linear algebra library is broken"
        )
    error = _UNIT * max(across.shape) * len(values) * float(values[0])
    return Root(float(values.sum()), residual, error, "singular values")


def _defect(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; 0 where both are zero."""
    size = float(expected.norm())
    gap = float((found - expected).norm())
    return gap / size if size else gap
