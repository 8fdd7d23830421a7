"""The Fréchet distance at infinitely many generated pictures; called by evaluation/.

The Fréchet distance of n generated pictures is biased by about a constant over n. Measured at
several n on random parts of the set and fitted by a line over 1 / n, its value at 1 / n = 0 is left
(Chong and Forsyth 2020). The real side is not extrapolated. Sizes go in equal steps from a tenth of
the pictures, 5,000 at most, to all of them. With fewer pictures in a part than dimensions the
distance does not follow the line, and the fit says little: there should be ten times as many
pictures as dimensions. All sizes must differ, or fewer points fix the line than were asked for.

A value costs `points` Fréchet distances.
"""

import warnings

import numpy as np
import torch

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.rng import Stream, bits

from . import influences
from .checked import check_features, options_of
from .frechet import distances_of_subsets, frechet_name
from .registry import Influences, Pair, Values, metric


class FdInfinityOptions(Config):
    """Options of the extrapolated Fréchet distance."""

    points: int = option(15, "numbers of pictures that the line is fitted through", ge=2)


def fd_infinity(
    real: torch.Tensor, generated: torch.Tensor, points: int = 15, *, warn: bool = True
) -> float:
    """The extrapolated distance of features (N, D) and (M, D)."""
    points = options_of(FdInfinityOptions, "fd_infinity", {"points": points}).points
    check_features(2, real=real, generated=generated)
    if len(generated) < (least := fewest(points)):
        raise UserError(
            f"{points} points need {least} generated pictures and there are {len(generated)}: draw "
            "more, or set points lower"
        )
    keep = torch.ones(len(real), dtype=torch.bool), torch.ones(len(generated), dtype=torch.bool)
    smallest = int(sizes(len(generated), points)[0])
    if warn and smallest <= real.shape[1]:
        warnings.warn(
            f"the smallest of {points} parts has {smallest} pictures in {real.shape[1]} "
            f"dimensions: the Fréchet distance does not follow 1 / n there",
            stacklevel=2,
        )
    keep = tuple(side[None] for side in keep)
    return float(_of_subsets(real, generated, *keep, points)[0])


def sizes(count: int, points: int) -> np.ndarray:
    """Numbers of pictures (points,) int64 from a tenth, 5,000 at most, to all."""
    return np.linspace(_smallest(count), count, points).astype(np.int64)


def fewest(points: int) -> int:
    """The fewest pictures of which so many parts all have different sizes."""
    count = points + 1
    while count - _smallest(count) < points - 1:  # steps shorter than one picture
        count += 1
    return count


def _smallest(count: int) -> int:
    return min(5000, max(count // 10, 2))


def intercept(numbers: np.ndarray, distances: np.ndarray) -> float:
    """The value at 1 / n = 0 of the least-squares line through distances over 1 / n."""
    design = np.stack([np.ones(len(numbers)), 1.0 / numbers], axis=1)
    return float(np.linalg.lstsq(design, distances, rcond=None)[0][0])


def _of_subsets(
    real: torch.Tensor,
    generated: torch.Tensor,
    keep_real: torch.Tensor,
    keep_generated: torch.Tensor,
    points: int,
) -> np.ndarray:
    """Extrapolated distances (R,) of R pairs of subsets, (R, N) and (R, M) bool."""
    parts, numbers = zip(*(_parts(keep, points) for keep in keep_generated.cpu()), strict=True)
    distances = distances_of_subsets(
        real, generated, keep_real.repeat_interleave(points, 0), torch.cat(parts)
    )
    return np.array(
        [intercept(n, d) for n, d in zip(numbers, distances.reshape(-1, points), strict=True)]
    )


def _parts(keep: torch.Tensor, points: int) -> tuple[torch.Tensor, np.ndarray]:
    """Random parts (points, M) of the kept rows (M,) and their numbers of pictures."""
    rows = keep.nonzero()[:, 0]
    numbers = sizes(len(rows), points)
    words = bits(0, Stream.PART, np.arange(points), len(keep))[:, rows.numpy()].astype(np.int64)
    rank = torch.from_numpy(words).argsort(dim=1, stable=True).argsort(dim=1)
    parts = torch.zeros(points, len(keep), dtype=torch.bool)
    parts[:, rows] = rank < torch.from_numpy(numbers)[:, None]
    return parts, numbers


def influences_of_extrapolated(
    pair: Pair, keep_real: torch.Tensor, keep_generated: torch.Tensor
) -> Influences:
    """What each row adds, by the influences on the distance and the row's places in the parts."""
    options = pair.options_as(FdInfinityOptions)
    one, two = influences.of_frechet(pair.real, pair.generated, keep_real, keep_generated)
    # Rows that are not kept have places too: what they would add is asked for as well.
    count = len(keep_generated)
    parts, numbers = _parts(torch.ones(count, dtype=torch.bool), options.points)
    # The intercept is linear in the distances: its weight of each is that of a unit vector.
    weights = np.array([intercept(numbers, unit) for unit in np.eye(len(numbers))])
    share = torch.from_numpy(weights * count / numbers) @ parts.double()
    # Influences hold up to a constant, which a share that differs by row would turn into noise.
    two = (two - two[keep_generated.to(two.device)].mean()) * share.to(two.device)
    return {f"{frechet_name(pair.features)} at infinity": (one, two)}


def enough_of_extrapolated(options: Config, dim: int) -> tuple[int, str]:
    """Pictures with which the smallest part follows the line."""
    why = "with fewer the distance does not follow 1 / n and the extrapolation is off"
    return 10 * (dim + 1), why


@metric(
    "fd_infinity",
    features="inception",
    better="lower",
    kind="distance",
    options=FdInfinityOptions,
    influences=influences_of_extrapolated,
    enough=enough_of_extrapolated,
    least=lambda options, share: fewest(options.points),
)
def extrapolated(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """FID at infinitely many pictures, or that of other features, of R pairs of subsets."""
    options = pair.options_as(FdInfinityOptions)
    found = _of_subsets(pair.real, pair.generated, real, generated, options.points)
    return {f"{frechet_name(pair.features)} at infinity": found}
