"""Every figure of two sets of features as an `Estimate`; called by evaluation/.

A metric (registry.py) gives the values of its figures on any subsets of the rows. Here it is asked
for all rows, and for random halves of both sides and their complements, which make intervals and
comparisons (intervals.py). Where halves cost too much, as the Fréchet distance of 2048 features
does, a metric may give the influence of each row instead: then

    L = mean over real rows of sign_i psi_i + the same of generated rows,

with the signs of the halving, is half of the difference of both halves to first order. E L^2 counts
the second-order part twice. Influences at one half and at the other, each centred on both, have no
common noise of second order: the mean of their L L' is the first-order part alone, and the mean of
both means the variance. L is shrunk to that, by no more than 2^(1/2): a standard error is at most
1.4 times too large where the halves have fewer rows than dimensions and nothing can be shrunk.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from etude.core.errors import UserError

from .checked import check_features
from .estimates import Estimate
from .intervals import HALF, QUARTER, IntervalConfig, halves
from .registry import METRICS, Metric, Pair, Values

_FEW_DIMENSIONS, _FEW_ROWS = 64, 256  # up to which halves are computed as they are
_OF_REAL = ("recall", "coverage")


def measure(
    pair: Pair, metric: Metric | str, config: IntervalConfig, seed: int = 0
) -> dict[str, Estimate]:
    """Every figure of a metric, by its name.

    Args:
        seed: names the halvings. Estimates that will be compared need the same one.

    Raises:
        UserError: a side has fewer pictures than the metric needs (`Metric.least`).
    """
    metric = METRICS.get(metric) if isinstance(metric, str) else metric
    check_features(0, generated=pair.generated)
    if not metric.needs_real:  # a real side that is looked at by nobody limits nothing
        pair = replace(pair, real=pair.generated[:0], real_labels=None)
    check_features(0, real=pair.real, generated=pair.generated)
    options = pair.options_as(metric.options)
    least = metric.least(options, 1.0)
    sides = (pair.real, pair.generated) if metric.needs_real else (pair.generated,)
    there = min(map(len, sides))
    if there < least:
        where = " on each side" if metric.needs_real else ""
        raise UserError(f"{metric.name} needs {least} pictures{where} and has {there}")
    values = metric.values(pair, 1.0, *pair.everything())
    units = _units(pair, metric)
    drawn = _on_subsets(pair, metric, config, seed, values) if units > 1 else {}
    drawn_by = _drawn_by(pair.generated_labels, pair.generated_prompts, len(pair.generated))
    return {
        name: Estimate(
            name,
            float(value[0]),
            {share: np.asarray(found[name], np.float64) for share, found in drawn.items()},
            kind=metric.kind,
            count=len(pair.real) if name in _OF_REAL else len(pair.generated),
            units=units,
            at_least=metric.at_least,
            drawn_by=f"{config.replicates} halvings of {drawn_by}, seed {seed}",
        )
        for name, value in values.items()
    }


def _on_subsets(
    pair: Pair, metric: Metric, config: IntervalConfig, seed: int, values: Values
) -> dict[float, Values]:
    """Values on halves, and on quarters where the kind of figure needs them, by share of rows.

    Empty where a half says nothing of the figure: its value then stands without an interval.
    """

    def split(quartered: bool) -> tuple[torch.Tensor, torch.Tensor]:
        real = len(pair.real), config.replicates, seed, 0, pair.real_labels
        generated = len(pair.generated), config.replicates, seed, 1, pair.generated_labels
        return (
            halves(*real, quartered=quartered),
            halves(*generated, pair.generated_prompts, quartered=quartered),
        )

    def suffices(sides: tuple[torch.Tensor, torch.Tensor], share: float) -> bool:
        fewest = min(int(side.sum(1).min()) for side in sides if side.shape[1])
        return fewest >= metric.least(pair.options_as(metric.options), share)

    if not config.replicates or not suffices(sides := split(False), HALF):
        return {}
    if metric.influences is not None and _is_large(pair):
        return {HALF: _by_influence(pair, metric, sides, values)}
    drawn = {HALF: metric.values(pair, HALF, *sides)}
    if metric.kind == "concentrated" and suffices(sides := split(True), QUARTER):
        drawn[QUARTER] = metric.values(pair, QUARTER, *sides)
    return drawn


def mean_of_scores(
    name: str,
    scores: np.ndarray | torch.Tensor,
    config: IntervalConfig,
    *,
    prompts: Sequence[int] | torch.Tensor | None = None,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    seed: int = 0,
) -> Estimate:
    """The mean of scores of pictures, such as CLIPScore.

    Its variance is exact: that of independent pictures or, with several pictures of a prompt, of
    prompts, by the linearised ratio of sums over prompts to numbers of pictures.

    Args:
        scores: (M,), one a picture.
        prompts: (M,) integers, the prompt of each picture; without them pictures are independent.
        at_least, at_most: the smallest and the largest value that a score can have.
        seed: as in `measure`.

    The mean of one picture or prompt has no known error.

    Raises:
        UserError: a score is not finite, or there is not one prompt a score.
    """
    scores = torch.as_tensor(scores).to("cpu", torch.float64)
    finite = scores.isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise UserError(
            f"score {row} of {name} is {float(scores[row])}: look at what made it, or leave that "
            "picture out"
        )
    clusters = None if prompts is None else torch.as_tensor(prompts).cpu()
    if clusters is not None and len(clusters) != len(scores):
        raise UserError(
            f"{name} has {len(clusters)} prompts for {len(scores)} scores; give one a score"
        )
    units = torch.arange(len(scores))
    if clusters is not None:
        _, units = torch.unique(clusters, return_inverse=True)
    number = int(units.max()) + 1 if len(units) else 0
    value = float(scores.mean())
    if number < 2:
        return Estimate(name, value, at_least=at_least, at_most=at_most)
    errors = torch.zeros(number, dtype=torch.float64).index_add_(0, units, scores - value)
    drawn: dict[float, np.ndarray] = {}
    if config.replicates:
        mask = halves(len(scores), config.replicates, seed, 1, clusters=clusters).double()
        drawn = {HALF: (mask @ scores / mask.sum(1)).numpy()}
    drawn_by = _drawn_by(None, clusters, len(scores))
    return Estimate(
        name,
        value,
        drawn,
        count=0,
        at_least=at_least,
        at_most=at_most,
        drawn_by=f"{config.replicates} halvings of {drawn_by}, seed {seed}",
        errors=(errors / len(scores)).numpy(),
    )


def _units(pair: Pair, metric: Metric) -> int:
    """Independent pictures, or prompts, of the side that has fewer."""
    prompts = pair.generated_prompts
    generated = len(pair.generated) if prompts is None else len(torch.unique(prompts))
    return min(generated, len(pair.real)) if metric.needs_real else generated


def _is_large(pair: Pair) -> bool:
    rows = max(len(pair.real), len(pair.generated))
    return pair.generated.shape[1] > _FEW_DIMENSIONS and rows > _FEW_ROWS


def _by_influence(
    pair: Pair, metric: Metric, split: tuple[torch.Tensor, torch.Tensor], values: dict
) -> dict[str, np.ndarray]:
    """Values on halves and their complements, (2 R,), to first order and of the right spread."""
    count = len(split[0]) // 2
    signs = [2.0 * side[:count].double() - 1.0 for side in split]

    def along(kept: tuple[torch.Tensor, torch.Tensor]) -> dict[str, np.ndarray]:
        psi = metric.influences(pair, *kept)
        return {
            name: sum(
                (sign @ _centred(one.cpu(), rows) / max(len(one), 1)).numpy()
                for sign, one, rows in zip(signs, sides, kept, strict=True)
            )
            for name, sides in psi.items()
        }

    whole = along(tuple(side[0] for side in pair.everything()))
    shrink = dict.fromkeys(whole, 1.0)
    fewest = min(int(side[0].sum()) for side in split if side.shape[1])
    if fewest > pair.generated.shape[1]:
        one, other = (along((split[0][i], split[1][i])) for i in (0, count))
        for name, half in whole.items():
            total = float(np.mean(half**2))
            share = float(np.mean(one[name] * other[name])) / total if total > 0.0 else 1.0
            if math.isfinite(share):  # else rows outside of a half have no influence on it
                shrink[name] = (0.5 * (1.0 + min(max(share, 0.0), 1.0))) ** 0.5
    return {
        name: float(values[name][0]) + np.concatenate([half, -half]) * shrink[name]
        for name, half in whole.items()
    }


def _centred(psi: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Influences (N,) less their means over the kept rows and over the others."""
    psi = psi.double().clone()
    for rows in (kept, ~kept):
        if bool(rows.any()):
            psi[rows] -= psi[rows].mean()
    return psi


def _drawn_by(labels: torch.Tensor | None, prompts: torch.Tensor | None, count: int) -> str:
    """What halves of generated pictures depend on beside their number and the seed."""
    found = f"{count} pictures"
    for what, these in (("prompts", prompts), ("labels", None if prompts is not None else labels)):
        if these is not None:
            _, these = torch.unique(these.cpu(), return_inverse=True)
            digest = hashlib.sha256(these.numpy().astype(np.int64).tobytes()).hexdigest()
            found += f" by {what} {digest[:12]}"
    return found
