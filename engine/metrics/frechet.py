"""The Fréchet distance of two Gaussians fitted to features; called by evaluation/.

    d^2 = |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)           (Heusel et al. 2017)

The last trace comes with a bound of its error from gaussians.py. A `FrechetReference` keeps what
depends on the real side alone (moments and factor), so that each further checkpoint or group costs
the products with that factor and one set of symmetric eigenvalues. All arithmetic is float64.

Only with Inception pool3 features is the number an FID, and only with the first seven channels of
an Inception layer, by position, an sFID (Nash et al. 2021). It is biased upwards by roughly a
constant over n, so two distances compare only at equal n.

Values of many subsets, for an interval: moments by taking the dropped rows away where those are
fewer; below 65 dimensions all subsets at once; with no more rows than dimensions from submatrices
of X Y^T, centred again, so that nothing of size D is touched per subset.
"""

import warnings

import numpy as np
import torch

from etude.core.config import Config

from . import influences
from .checked import check_alike, check_features
from .gaussians import Gaussian, Root, root_of_products, trace_root
from .moments import Moments
from .registry import Influences, Pair, Values, metric
from .remembered import remember

_SMALL = 64  # dimensions up to which many subsets are computed at once
_TOGETHER = 256  # subsets of that size, for whose rows there are masks in float64


class FrechetReference:
    """One side of Fréchet distances, made ready once.

    Args:
        real: features (N, D) of any float type, or their `Moments`.
    """

    def __init__(self, real: torch.Tensor | Moments) -> None:
        if not isinstance(real, Moments):
            check_features(2, real=real)
        self.gaussian = Gaussian(real)
        if self.gaussian.rows is None:
            _ = self.gaussian.cholesky

    def distance(self, generated: torch.Tensor | Moments, *, warn: bool = True) -> float:
        """The distance to another set of features or its moments."""
        return self.measured(generated, warn=warn)[0]

    def measured(
        self, generated: torch.Tensor | Moments, *, warn: bool = True
    ) -> tuple[float, Root]:
        """The distance and the certified root in it; twice `root.error` bounds its error."""
        if not isinstance(generated, Moments):
            check_features(2, generated=generated)
        one, two = self.gaussian, Gaussian(generated)
        check_alike(real=one.mean, generated=two.mean)
        fewest, dim = min(one.count, two.count), len(one.mean)
        if warn and fewest <= dim:
            warnings.warn(
                f"Fréchet distance of {fewest} pictures in {dim} dimensions: the covariance is "
                f"singular and the value mostly reflects the number of pictures; prefer KID",
                stacklevel=3,
            )
        root = trace_root(one, two)
        offset = (one.mean - two.mean).square().sum()
        return float(offset + one.trace + two.trace) - 2.0 * root.value, root


def frechet_distance(
    first: torch.Tensor | Moments, second: torch.Tensor | Moments, *, warn: bool = True
) -> float:
    """The Fréchet distance of two sets of features.

    Args:
        first, second: features (N, D) of any float type, or their `Moments`.
        warn: say so when a side has fewer rows than dimensions; the distance then mostly measures
            the number of rows.

    Raises:
        ValueError: a side has fewer than two rows, or features that are not finite.
    """
    sides = {"first": first, "second": second}
    check_features(2, **{n: side for n, side in sides.items() if not isinstance(side, Moments)})
    check_alike(
        **{n: side.mean if isinstance(side, Moments) else side for n, side in sides.items()}
    )
    return FrechetReference(first).measured(second, warn=warn)[0]


def frechet_name(features: str) -> str:
    """What a figure is called: FID for Inception features alone, else the features are named."""
    known = {"inception": "FID", "inception/spatial": "sFID"}
    return known.get(features, f"Fréchet distance ({features} features)")


def influences_of_frechet(
    pair: Pair, keep_real: torch.Tensor, keep_generated: torch.Tensor
) -> Influences:
    """What each row adds to the distance of the kept ones."""
    found = influences.of_frechet(pair.real, pair.generated, keep_real, keep_generated)
    return {frechet_name(pair.features): found}


def enough_of_frechet(options: Config, dim: int) -> tuple[int, str]:
    """Pictures for a covariance that is not singular."""
    return dim + 1, "with fewer the covariance is singular and the value mostly counts pictures"


@metric(
    "frechet",
    features="inception",
    better="lower",
    kind="distance",
    at_least=0.0,
    influences=influences_of_frechet,
    enough=enough_of_frechet,
)
def frechet(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """FID, or the Fréchet distance of other features, of R pairs of subsets."""
    found = distances_of_subsets(pair.real, pair.generated, real, generated)
    return {frechet_name(pair.features): found}


def distances_of_subsets(
    first: torch.Tensor,
    second: torch.Tensor,
    keep_first: torch.Tensor,
    keep_second: torch.Tensor,
) -> np.ndarray:
    """Fréchet distances (R,) float64 of R pairs of subsets of features (N, D) and (M, D).

    Args:
        keep_first, keep_second: (R, N) and (R, M) bool, the rows of each subset.
    """
    kept = int(keep_first.sum(1).min()), int(keep_second.sum(1).min())
    if len(keep_first) > 1 and first.shape[1] <= min(_SMALL, min(kept) - 1):
        blocks = zip(keep_first.split(_TOGETHER), keep_second.split(_TOGETHER), strict=True)
        found = [_all_at_once(first, second, *block) for block in blocks]
        if all(one is not None for one in found):
            return np.concatenate(found)
    if len(keep_first) > 1 and max(len(first), len(second)) <= first.shape[1]:
        return _from_products(first, second, keep_first, keep_second)
    found = []
    for one, two in zip(keep_first, keep_second, strict=True):
        if bool(one.all()):
            reference = remember(first, "frechet reference", lambda: FrechetReference(first))
        else:
            reference = FrechetReference(kept_part(first, one))
        found.append(reference.distance(kept_part(second, two), warn=False))
    return np.array(found)


def kept_part(features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor | Moments:
    """The kept rows where they are few, else their moments, from whichever rows are fewer."""
    count = int(keep.sum())
    keep = keep.to(features.device)
    if count <= features.shape[1]:
        return features[keep]
    if 2 * count <= len(features):
        return Moments.of(features[keep])
    total = remember(features, "moments", lambda: Moments.of(features))
    return total if count == len(features) else total.without(Moments.of(features[~keep]))


def _all_at_once(
    first: torch.Tensor, second: torch.Tensor, keep_first: torch.Tensor, keep_second: torch.Tensor
) -> np.ndarray | None:
    """All subsets of features of few dimensions; None where a covariance is singular."""
    centre = first.to(torch.float64).mean(0)
    means, covariances = zip(
        _moments_of_subsets(first.to(torch.float64) - centre, keep_first),
        _moments_of_subsets(second.to(torch.float64) - centre, keep_second),
        strict=True,
    )
    factor, failed = torch.linalg.cholesky_ex(covariances[0])
    if bool(failed.any()):
        return None
    roots = root_of_products(factor.mT @ covariances[1] @ factor, first.shape[1])
    traces = sum(side.diagonal(dim1=1, dim2=2).sum(1) for side in covariances)
    return ((means[0] - means[1]).square().sum(1) + traces - 2 * roots).cpu().numpy()


def _moments_of_subsets(
    x: torch.Tensor, keep: torch.Tensor, block: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (R, D) and covariances (R, D, D) of subsets of float64 rows (N, D) near zero."""
    mask = keep.to(x.device, torch.float64)
    count, dim = mask.sum(1), x.shape[1]
    mean = mask @ x / count[:, None]
    second = x.new_zeros(len(mask), dim * dim)
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        second += mask[:, start : start + block] @ (rows[:, :, None] * rows[:, None, :]).flatten(1)
    scatter = second.view(-1, dim, dim) - count[:, None, None] * mean[:, :, None] * mean[:, None, :]
    return mean, scatter / (count - 1)[:, None, None]


def _from_products(
    first: torch.Tensor, second: torch.Tensor, keep_first: torch.Tensor, keep_second: torch.Tensor
) -> np.ndarray:
    """Subsets of no more rows than dimensions.

    With G = X Y^T the centred rows of subsets have G's submatrix less its row and column means,
    plus its mean, as their products.
    """
    x, y = first.to(torch.float64), second.to(torch.float64)
    centre = x.mean(0)
    x, y = x - centre, y - centre
    products, found = x @ y.T, []
    for keep in zip(keep_first.to(x.device), keep_second.to(x.device), strict=True):
        sides = [side[rows] for side, rows in zip((x, y), keep, strict=True)]
        means = [side.mean(0) for side in sides]
        traces = [
            (side.square().sum() - len(side) * mean.square().sum()) / (len(side) - 1)
            for side, mean in zip(sides, means, strict=True)
        ]
        part = products[keep[0]][:, keep[1]]
        part = part - part.mean(0) - part.mean(1, keepdim=True) + part.mean()
        part = part if len(part) <= part.shape[1] else part.T
        n, m = (len(side) - 1 for side in sides)
        root = root_of_products((part @ part.T / (n * m))[None], min(n, m))[0]
        offset = (means[0] - means[1]).square().sum()
        found.append(float(offset + traces[0] + traces[1] - 2 * root))
    return np.array(found)
