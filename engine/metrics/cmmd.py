"""CMMD: the discrepancy of CLIP embeddings under a Gaussian kernel; called by evaluation/.

    x, y       embeddings divided by their lengths
    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),   sigma = 10
    CMMD    = 1000 (mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j))

(Jayasumana et al. 2024.) The published code counts the pairs i = j, which adds about
1000 (1 - mean k) (1 / N + 1 / M): the figure then depends on n. The unbiased one does not, and may
be slightly negative.
"""

from typing import Literal

import torch

from etude.core.config import Config, option

from .checked import check_features, options_of
from .directions import apart
from .kernel_sums import discrepancies
from .registry import Pair, Values, metric


class CmmdOptions(Config):
    """Options of CMMD."""

    estimator: Literal["biased", "unbiased"] = option(
        "biased", "biased: pairs of a picture with itself count, as in the published code"
    )
    sigma: float = option(10.0, "width of the Gaussian kernel", gt=0)


def cmmd(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    estimator: Literal["biased", "unbiased"] = "biased",
    sigma: float = 10.0,
) -> float:
    """CMMD of embeddings (N, D) and (M, D) of any length."""
    options = options_of(CmmdOptions, "cmmd", {"estimator": estimator, "sigma": sigma})
    check_features(2 if estimator == "unbiased" else 1, first=first, second=second)
    keep = torch.ones(1, len(first), dtype=torch.bool), torch.ones(1, len(second), dtype=torch.bool)
    return float(cmmd_of_subsets(first, second, *keep, options)[0])


def cmmd_of_subsets(
    first: torch.Tensor,
    second: torch.Tensor,
    keep_first: torch.Tensor,
    keep_second: torch.Tensor,
    options: CmmdOptions,
) -> torch.Tensor:
    """CMMD of R pairs of subsets, (R,) float64; masks as in `kid_of_subsets`."""
    scale = 1.0 / options.sigma**2
    first, second = apart(first, second)

    def kernel(products: torch.Tensor) -> torch.Tensor:
        return products.sub_(1.0).mul_(scale).exp_()  # |x - y|^2 = 2 - 2 x . y

    found = discrepancies(
        first, second, keep_first, keep_second, kernel,
        name=f"gaussian {options.sigma}", unbiased=options.estimator == "unbiased", normalise=True,
    )  # fmt: skip
    return 1000.0 * found


@metric("cmmd", features="clip", better="lower", kind="distance", options=CmmdOptions)
def discrepancy(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """CMMD of R pairs of subsets; features other than CLIP's are named."""
    options = pair.options_as(CmmdOptions)
    found = cmmd_of_subsets(pair.real, pair.generated, real, generated, options)
    name = "CMMD" if pair.features == "clip" else f"Gaussian discrepancy ({pair.features} features)"
    return {name: found.cpu().numpy()}
