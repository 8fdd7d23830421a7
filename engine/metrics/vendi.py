"""The Vendi score: how many different pictures there seem to be; called by evaluation/.

    K_ij = x_i . x_j for features of length one,   l the eigenvalues of K / n
    VS_q = exp( log(sum l^q) / (1 - q) ),   VS_1 = exp( - sum l log l ),   VS_inf = 1 / max l

(Friedman and Dieng 2023; Pasarkar and Dieng 2024 for the order q.) The eigenvalues other than zero
are also those of the D x D matrix X^T X / n, so the smaller of the two is taken. It looks at one
set alone: 1 for copies of one picture, n for pictures that have nothing in common. It grows with n,
so compare at equal n. Small q counts rare kinds of pictures, large q the common ones.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from etude.core.config import Config, option

from . import influences
from .checked import check_features, options_of
from .directions import apart
from .registry import Influences, Pair, Values, metric

_BLOCK = 4096


class VendiOptions(Config):
    """Options of the Vendi score."""

    q: float = option(1.0, "order of the entropy, inf included", ge=0)


def vendi_score(features: torch.Tensor, q: float = 1.0) -> float:
    """The Vendi score of order q of features (N, D) of any length."""
    options = options_of(VendiOptions, "vendi_score", {"q": q})
    check_features(given=features)
    keep = torch.ones(1, len(features), dtype=torch.bool)
    return float(scores_of_subsets(features, keep, options.q)[0])


def scores_of_subsets(features: torch.Tensor, keep: torch.Tensor, q: float) -> np.ndarray:
    """The Vendi scores of R subsets of features (N, D), (R,) float64; keep (R, N) bool."""
    keep = keep.to(features.device)
    (features,) = apart(features)
    if len(features) <= features.shape[1]:
        x = F.normalize(features.to(torch.float64), dim=1)
        gram = x @ x.T
        grams = (gram[one][:, one] for one in keep)
    else:
        total = _second_moment(features)
        # Whichever rows are fewer are read: the kept ones, or those that go.
        grams = (
            _second_moment(features[one])
            if 2 * int(one.sum()) < len(one)
            else total - _second_moment(features[~one])
            for one in keep
        )
    found = [
        score_of_eigenvalues(torch.linalg.eigvalsh(gram) / int(one.sum()), q)
        for gram, one in zip(grams, keep, strict=True)
    ]
    return np.array(found)


def score_of_eigenvalues(values: torch.Tensor, q: float) -> float:
    """exp of the Rényi entropy of order q of eigenvalues that add up to one."""
    values = values[values > 1e-12 * values.max()]  # at q < 1 rounding of zeros would count
    if q == 1:
        return float((-(values * values.log()).sum()).exp())
    if math.isinf(q):
        return float(1.0 / values.max())
    return float((values.pow(q).sum().log() / (1.0 - q)).exp())


def _second_moment(features: torch.Tensor) -> torch.Tensor:
    """X^T X (D, D) float64 of rows of length one."""
    total = features.new_zeros((features.shape[1],) * 2, dtype=torch.float64)
    for rows in features.split(_BLOCK):
        x = F.normalize(rows.to(torch.float64), dim=1)
        total.addmm_(x.T, x)
    return total


def influences_of_vendi(
    pair: Pair, keep_real: torch.Tensor, keep_generated: torch.Tensor
) -> Influences:
    """What each row adds to the score of the kept ones."""
    order = pair.options_as(VendiOptions).q
    (features,) = apart(pair.generated)
    value = float(scores_of_subsets(features, keep_generated[None], order)[0])
    found = value * influences.of_vendi(features, keep_generated, order)
    return {_name(pair.features, order): (pair.real.new_zeros(len(pair.real)), found)}


@metric(
    "vendi",
    features="inception",
    better="higher",
    at_least=1.0,
    needs_real=False,
    options=VendiOptions,
    influences=influences_of_vendi,
)
def vendi(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """The Vendi score of R subsets of generated pictures."""
    options = pair.options_as(VendiOptions)
    found = scores_of_subsets(pair.generated, generated, options.q)
    return {_name(pair.features, options.q): found}


def _name(features: str, q: float) -> str:
    order = "" if q == 1 else f", q={q:g}"
    return f"Vendi score ({features} features{order})"
