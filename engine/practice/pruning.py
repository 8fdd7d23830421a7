"""Generate, then prune: which of many candidate pictures are kept; called by sources.py.

The baseline that guidance is measured against (arXiv 2502.15588, section 5.3): draw more pictures
than are wanted, order them by how hard they are, and keep the hardest (or easiest). All candidates
stand in one total order: by score, then by a random word of their own, so that equal scores are
never decided by a place in memory. Keeping easy ones reads the same order from its other end.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, Self

import numpy as np
from pydantic import model_validator
from torch import nn

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.rng import Stream, bits, permute

from .pictures import Pictures
from .scores import NEEDS, DynUnc, Forgetting, averaged, correctness, score_pictures

# Rounds draw their words 2^40 apart, so a candidate of one round never shares one of another.
_ROUND = 40

ScoreName = Literal[
    "entropy",
    "margin",
    "least_confidence",
    "loss",
    "el2n",
    "grand",
    "forgetting",
    "dyn_unc",
    "random",
]


class PruneConfig(Config):
    """What candidates are ordered by, and which part of the order is kept."""

    score: ScoreName = option("entropy", "what orders the candidates; random keeps any of them")
    keep: Literal["hard", "easy"] = option("hard", "which end of the order is kept")
    oversampling: float = option(2.0, "pictures drawn for each picture kept", ge=1)
    upper_cut: float = option(
        0.0, "share of the candidates, the hardest, that is left out before keeping", ge=0, lt=1
    )
    balanced: bool = option(True, "keep equally many pictures of every class")
    proxies: int = option(
        0, "learners trained only to score by el2n, grand, forgetting or dyn_unc; 0: none", ge=0
    )
    proxy_steps: int = option(0, "optimizer steps of every proxy", unit="steps", ge=0)
    proxy_looks: int = option(
        10, "looks at a proxy for forgetting and dyn_unc, evenly spaced, one at the end", gt=1
    )
    window: int = option(10, "consecutive looks whose deviation dyn_unc takes", gt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._refuse_idle()
        watched = self.score != "random" and NEEDS[self.score].history
        if watched and not self.proxies:
            raise ValueError(
                f"prune.score={self.score} watches learners that train: set prune.proxies=1 or more"
            )
        if self.proxies and self.proxy_steps < (self.proxy_looks if watched else 1):
            least = f"prune.proxy_looks={self.proxy_looks}" if watched else "1"
            raise ValueError(f"prune.proxy_steps={self.proxy_steps} must be at least {least}")
        if self.score == "dyn_unc" and self.window > self.proxy_looks:
            raise ValueError(
                f"prune.window={self.window} is above prune.proxy_looks={self.proxy_looks}: lower "
                "the one or raise the other"
            )
        if self.oversampling * (1.0 - self.upper_cut) < 1.0 - 1e-9:
            raise ValueError(
                f"prune.upper_cut={self.upper_cut} leaves fewer of the candidates than are kept: "
                f"set prune.oversampling to at least {1.0 / (1.0 - self.upper_cut):.3g}"
            )
        return self

    def _refuse_idle(self) -> None:
        idle = []
        if self.score == "random":
            idle += [(name, "another prune.score") for name in ("keep", "upper_cut")]
        if self.keep == "easy":
            idle.append(("upper_cut", "prune.keep=hard"))
        needs = NEEDS.get(self.score)
        if needs is None or not (needs.proxies or needs.history):
            idle.append(("proxies", "prune.score to el2n, grand, forgetting or dyn_unc"))
        if not self.proxies:
            idle.append(("proxy_steps", "prune.proxies"))
        if needs is None or not needs.history:
            idle.append(("proxy_looks", "prune.score to forgetting or dyn_unc"))
        if self.score != "dyn_unc":
            idle.append(("window", "prune.score=dyn_unc"))
        for name, wanted in idle:
            if self.differs(name):
                raise ValueError(f"prune.{name} has no effect here: leave it out, or set {wanted}")

    def candidates(self, count: int, classes: int) -> int:
        """Pictures to draw for `count` kept ones: a multiple of `classes`, so balance holds."""
        drawn = math.ceil(round(count * self.oversampling, 6))
        return -(-drawn // classes) * classes

    def look_steps(self) -> list[int]:
        """Steps after which a proxy is handed out: its last one, or evenly spaced ones."""
        if self.score == "random" or not NEEDS[self.score].history:
            return [self.proxy_steps] if self.proxies else []
        looks = range(1, self.proxy_looks + 1)
        return [look * self.proxy_steps // self.proxy_looks for look in looks]


def select(
    scores: np.ndarray,
    labels: np.ndarray,
    count: int,
    config: PruneConfig,
    *,
    seed: int,
    number: int,
    classes: int,
    ids: np.ndarray | None = None,
) -> np.ndarray:
    """Which candidates are kept, (count,) int64 places in `scores`, ascending.

    With `balanced`, every class keeps count // classes of its own pictures; what is left over goes
    to count mod classes different classes, drawn at random, one picture each. `upper_cut` leaves
    out floor(upper_cut * n) of all n candidates, or of each class when balanced.

    Args:
        scores: (n,) finite, larger is harder; not read by score=random.
        labels: (n,) int64 in [0, classes).
        number: of the round; rounds break their ties independently.
        ids: (n,) int64 in [0, 2^40), what a candidate's random word belongs to, each once; the
            places themselves by default. With ids that stay with the pictures (their seed
            indices), what is kept does not depend on the order of the candidates.

    Raises:
        UserError: a score that is not finite, or too few candidates, in all or of a class.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    ids = np.arange(len(labels)) if ids is None else np.asarray(ids)
    if config.score == "random":
        scores = np.zeros(len(labels))
    elif not np.isfinite(scores).all():
        where = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise UserError(
            f"the {config.score} score of candidate {where} in round {number} is not finite: lower "
            "learner.lr, or choose another prune.score"
        )
    words = bits(seed, Stream.PRUNE, ids + (number << _ROUND), 2)
    easy_first = np.lexsort((ids, words[:, 1], words[:, 0], scores))
    if not config.balanced:
        return np.sort(_end_of(easy_first, count, config, f"round {number}"))
    wanted = np.full(classes, count // classes)
    wanted[permute(np.arange(count % classes), classes, seed, Stream.PRUNE_CLASS, number)] += 1
    kept = [
        _end_of(
            easy_first[labels[easy_first] == label],
            int(wanted[label]),
            config,
            f"class {label} in round {number}",
        )
        for label in range(classes)
    ]
    return np.sort(np.concatenate(kept))


def _end_of(easy_first: np.ndarray, count: int, config: PruneConfig, where: str) -> np.ndarray:
    """The `count` hardest (or easiest) of one group, after its hardest were cut off."""
    total = len(easy_first)
    cut = math.floor(round(config.upper_cut * total, 6))
    left = easy_first[: total - cut]
    if len(left) < count:
        raise UserError(
            f"{where} has {total} candidates, {len(left)} after prune.upper_cut="
            f"{config.upper_cut}, and is to keep {count}: raise prune.oversampling (now "
            f"{config.oversampling})"
        )
    return left[:count] if config.keep == "easy" else left[len(left) - count :]


def candidate_scores(
    config: PruneConfig,
    pictures: Pictures,
    learner: nn.Module,
    train: Callable[[int], Iterator[nn.Module]],
) -> np.ndarray:
    """Scores (n,) float64 of all `pictures`: by `learner`, or by proxies when the config asks.

    Args:
        learner: frozen, the one that the pictures are chosen for.
        train: see `proxy_scores`.
    """
    if config.score == "random":
        return np.zeros(len(pictures))
    if config.proxies:
        return proxy_scores(config, pictures, train)
    return score_pictures(config.score, learner, pictures)


def proxy_scores(
    config: PruneConfig, pictures: Pictures, train: Callable[[int], Iterator[nn.Module]]
) -> np.ndarray:
    """Scores (n,) float64 of all `pictures`, averaged over `config.proxies` learners.

    EL2N and GraNd are taken of the last model of each proxy. Forgetting and Dyn-Unc look at every
    model: all pictures at once, where their papers look at each as it comes up in a mini batch.

    Args:
        train: trains proxy number 0, 1, ... from its own initial weights and yields it, frozen and
            in evaluation mode, after each of `config.look_steps()`.
    """
    if not NEEDS[config.score].history:
        last = (_last(train(number)) for number in range(config.proxies))
        return averaged(config.score, last, pictures)
    total, every = np.zeros(len(pictures)), np.arange(len(pictures))
    for number in range(config.proxies):
        forgetting = Forgetting(len(pictures))
        uncertainty = DynUnc(len(pictures), config.window)
        for model in train(number):
            if config.score == "forgetting":
                forgetting.observe(every, correctness(model, pictures))
            else:
                uncertainty.observe(np.exp(-score_pictures("loss", model, pictures)))
        total += (forgetting if config.score == "forgetting" else uncertainty).values()
    return total / config.proxies


def _last(models: Iterator[nn.Module]) -> nn.Module:
    last = None
    for model in models:
        last = model
    if last is None:
        raise ValueError("a proxy's training yielded no model: it must yield after its last step")
    return last
