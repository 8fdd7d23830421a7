"""The kernel Inception distance, unbiased and over all pairs; called by evaluation/.

    k(x, y) = (x . y / D + 1)^3
    KID = mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean k(x_i, y_j)

(Binkowski et al. 2018.) It is unbiased at any n and may be slightly negative. Here every pair
counts once, block by block, so the value has no subset noise. The usual tools average 100 random
subsets of 1,000 instead; option `parts` does that, with subsets drawn by position, for comparison
with numbers made so.
"""

import torch
from pydantic import model_validator

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.rng import Stream, bits

from .checked import check_features
from .kernel_sums import discrepancies
from .registry import Pair, Values, metric


def kid(first: torch.Tensor, second: torch.Tensor, block: int = 1024) -> float:
    """The unbiased KID of features (N, D) and (M, D), multiplied by nothing."""
    check_features(2, first=first, second=second)
    keep = torch.ones(1, len(first), dtype=torch.bool), torch.ones(1, len(second), dtype=torch.bool)
    return float(kid_of_subsets(first, second, *keep, block=block)[0])


def kid_of_subsets(
    first: torch.Tensor,
    second: torch.Tensor,
    keep_first: torch.Tensor,
    keep_second: torch.Tensor,
    block: int = 1024,
) -> torch.Tensor:
    """The unbiased KID of R pairs of subsets, (R,) float64.

    Args:
        keep_first, keep_second: (R, N) and (R, M) bool, the rows of each subset; at least two rows
            in each.
    """
    return discrepancies(
        first, second, keep_first, keep_second, _cubic(first.shape[1]), name="kid", block=block
    )


def kid_of_parts(
    first: torch.Tensor, second: torch.Tensor, rows_first: torch.Tensor, rows_second: torch.Tensor
) -> torch.Tensor:
    """The unbiased KID of P parts, (P,) float64, as torch-fidelity, clean-fid and torchmetrics do.

    Args:
        rows_first, rows_second: (P, S) int64, the rows of features (N, D) and (M, D) in each part.
    """
    kernel, size = _cubic(first.shape[1]), rows_first.shape[1]
    found = []
    for one, two in zip(rows_first, rows_second, strict=True):
        x, y = first[one].to(torch.float64), second[two].to(torch.float64)
        own = [kernel(side @ side.T) for side in (x, y)]
        within = sum(part.sum() - part.diagonal().sum() for part in own)
        found.append(within / (size * (size - 1)) - 2.0 * kernel(x @ y.T).mean())
    return torch.stack(found)


class KidOptions(Config):
    """Options of the kernel distance."""

    parts: int = option(0, "random parts whose mean is taken; 0: all pairs, once", ge=0)
    part_size: int = option(1000, "pictures of each side in a part", unit="pictures", ge=2)

    @model_validator(mode="after")
    def _nothing_idle(self) -> "KidOptions":
        if not self.parts and self.differs("part_size"):
            raise ValueError("part_size has no effect without parts; set parts=100 too")
        return self


def kernel_name(features: str) -> str:
    """KID for Inception features alone, else the features are named."""
    return "KID" if features == "inception" else f"kernel distance ({features} features)"


@metric(
    "kid",
    features="inception",
    better="lower",
    kind="distance",
    options=KidOptions,
    least=lambda options, share: options.part_size if options.parts and share == 1.0 else 2,
)
def kernel_distance(
    pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor
) -> Values:
    """KID, or the kernel distance of other features, of R pairs of subsets.

    Parts are taken of whole sets alone: of their halves all pairs count, whose mean is the same and
    whose spread is that of the pictures, to which a hundred parts add little.
    """
    options = pair.options_as(KidOptions)
    if not options.parts or share < 1.0:
        found = kid_of_subsets(pair.real, pair.generated, real, generated)
        return {kernel_name(pair.features): found.cpu().numpy()}
    means = []
    for one, two in zip(real, generated, strict=True):
        rows = [drawn_parts(keep, options, side) for side, keep in enumerate((one, two))]
        means.append(kid_of_parts(pair.real, pair.generated, *rows).mean())
    return {kernel_name(pair.features): torch.stack(means).cpu().numpy()}


def drawn_parts(keep: torch.Tensor, options: KidOptions, side: int) -> torch.Tensor:
    """Rows (P, S) int64 of random parts of the kept rows (N,) bool, each without repetition."""
    rows = keep.nonzero()[:, 0].cpu()
    if len(rows) < options.part_size:
        raise UserError(
            f"parts of {options.part_size} pictures cannot be drawn from {len(rows)}; "
            f"set kid.part_size={len(rows)} or less"
        )
    positions = [part + (side << 32) for part in range(options.parts)]
    words = torch.from_numpy(bits(0, Stream.PART, positions, len(rows)).astype("int64"))
    return rows[words.argsort(dim=1, stable=True)[:, : options.part_size]]


def _cubic(dim: int):
    def kernel(products: torch.Tensor) -> torch.Tensor:
        products = products.div_(dim).add_(1.0)
        return products.square().mul_(products)

    return kernel
