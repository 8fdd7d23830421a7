"""AuthPct: the share of generated pictures that are no near copies; called by evaluation/.

For the training picture x that is nearest to a generated picture y (Alaa et al. 2022, section 3.3):

    y is authentic where |y - x| > |x - x'|, x' the nearest other training picture of x
    AuthPct = 100 times the share of authentic y

Higher is better. With pictures of another set than the generator was trained on it says nothing of
copying. Neighbours that subsets need are listed as in prdc.py.
"""

import torch

from etude.kernels import nearest_neighbours

from .checked import check_features
from .hits import few_subsets
from .prdc import Neighbours, enough, own_neighbours
from .registry import Pair, Values, metric


def authentic(generated: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Which generated pictures (M, D) are no near copies of training pictures (N, D), (M,) bool."""
    check_features(generated=generated, training=train)
    across, own = _listed(generated, train, 1.0)
    return across.distance[:, 0] > own.distance[across.row[:, 0], 0]


@metric("authenticity", features="inception", better="higher", kind="concentrated", at_least=0.0)
def authenticity(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """AuthPct of R pairs of subsets of training and generated pictures, in percent."""
    across, own = _listed(pair.generated, pair.real, share)
    kept_x, kept_y = (kept.to(own.row.device).T.contiguous() for kept in (real, generated))
    found = []
    for some in few_subsets(max(map(len, (kept_x, kept_y))), len(real)):
        place = across.places(kept_x[:, some], 1)
        train, far = across.row.gather(1, place), across.distance.gather(1, place)
        true = (far > own.radii(kept_x[:, some], 1).gather(0, train)) & kept_y[:, some]
        found.append(true.sum(0).double() / kept_y[:, some].sum(0))
    return {"AuthPct": 100.0 * torch.cat(found).cpu().numpy()}


def _listed(
    generated: torch.Tensor, train: torch.Tensor, share: float
) -> tuple[Neighbours, Neighbours]:
    """Training neighbours of every generated and of every training picture."""
    if len(train) < 2:
        raise ValueError(f"authenticity needs at least 2 training pictures, got {len(train)}")
    listed = enough(1, share, len(train))
    return (
        Neighbours(*nearest_neighbours(generated, train, k=listed)),
        own_neighbours(train, listed),
    )
