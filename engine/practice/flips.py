"""How many generated pictures no longer show the class asked for; called by telemetry.py.

Guidance toward hard pictures can push one over the border: it shows another class and keeps its
label. Two estimates of the share of such pictures, of unequal worth:

    judge       A classifier that was trained on real pictures disagrees with the label on a share D
                of the generated pictures, and errs on a share e of held-out real ones. With a share
                f flipped, D = (1 - f) e + f (1 - e / (K - 1)): a picture that shows its class is
                mistaken as real ones are, and a flipped one is called the asked class with a chance
                of e / (K - 1). Hence

                    f = (D - e) / (1 - e K / (K - 1))

                (Rogan and Gladen 1978, American Journal of Epidemiology 107:71-76, for both error
                rates of K classes that are confused evenly). It assumes that the judge errs on a
                generated picture of a class as often as on a real one, and that flips go to any
                other class alike. Judges err more on generated pictures, which makes f too large;
                flips to a class that the judge confuses with the one asked for make it too small.
    learner     Without a judge, learners count where they confidently see another class (Northcutt
                et al. 2021, arXiv 1911.00068): of lower quality, since a learner that was guided
                against, or that has learned the picture with its wrong label, is a party to it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from etude.core.errors import UserError

from .pictures import Pictures
from .scores import predict


@dataclass(frozen=True)
class Judge:
    """A classifier trained on real pictures, with its errors on real ones that it has not seen.

    Attributes:
        model: pictures (B, C, S, S) float32 in [-1, 1] to logits (B, K), in evaluation mode.
        wrong, count: (K,) int64, real pictures of each class that it mistakes, and all of them.
    """

    model: Callable[[Tensor], Tensor]
    wrong: np.ndarray
    count: np.ndarray

    @classmethod
    def measured(
        cls, model: Callable[[Tensor], Tensor], real: Pictures, classes: int, name: str = "judge"
    ) -> "Judge":
        """Measure a model on `real` pictures, which it must not have been trained on.

        Raises:
            UserError: a class without a picture, or a judge that is no better than chance.
        """
        logits, labels = predict(model, real)
        wrong = (logits.argmax(-1) != labels).numpy()
        count = np.bincount(labels.numpy(), minlength=classes)
        if not count.all():
            raise UserError(
                f"{name} cannot be measured on class {int(count.argmin())}: give real pictures of "
                "every class"
            )
        mistaken = np.bincount(labels.numpy()[wrong], minlength=classes)
        error = float((mistaken / count).mean())
        if error * classes / (classes - 1) >= 1.0:
            raise UserError(
                f"{name} mistakes {error:.1%} of real pictures of {classes} classes, no better than"
                " chance: give weights that were trained on real pictures of the same classes"
            )
        return cls(model, mistaken, count)


@dataclass(frozen=True)
class Flips:
    """An estimate of the share of flipped pictures, in [0, 1].

    Attributes:
        method: "judge", or "learner", which is of lower quality.
        value, low, high: the estimate and its interval at `level`; a learner's has None for an
            interval, since its error is not one of counting.
        disagreement: share of the pictures whose label the judge or the learner does not choose.
        base: the judge's share of mistakes on real pictures of the classes asked for.
        pictures: how many were looked at.
    """

    method: str
    value: float
    low: float | None
    high: float | None
    level: float | None
    disagreement: float
    base: float | None
    pictures: int

    def to_dict(self) -> dict:
        """For a report in JSON."""
        return asdict(self)


def judged_flips(
    judge: Judge, predicted: np.ndarray, labels: np.ndarray, level: float = 0.95
) -> Flips:
    """The corrected share of flips from what a judge says of generated pictures.

    The base error is that of the classes asked for, each in its share of the labels. The interval
    is conservative: D and e each lie in their Clopper-Pearson interval at (1 + level) / 2, and the
    estimate, monotone in each of them, is taken at the worst corners. For e the classes are strata,
    and counts those of a simple sample of equal variance (Korn and Graubard 1998).

    Args:
        predicted: (n,) int64 in [0, K), the judge's class of each generated picture.
        labels: (n,) int64 in [0, K), the classes asked for.
        level: coverage that is reached or passed, in (0, 1), under the assumptions above.
    """
    classes, total = len(judge.count), len(labels)
    wrong = int((np.asarray(predicted) != np.asarray(labels)).sum())
    share = np.bincount(labels, minlength=classes) / total
    rates = judge.wrong / judge.count
    base = float((share * rates).sum())
    variance = float((share**2 * rates * (1.0 - rates) / judge.count).sum())
    # Without a mistake there is no variance to read a size from; the thinnest stratum decides.
    asked = share > 0
    thinnest = float((judge.count[asked] / share[asked]).min())
    size = base * (1.0 - base) / variance if variance > 0 else thinnest
    inner = 0.5 * (1.0 + level)
    corners = [
        _corrected(disagreement, error, classes)
        for disagreement in clopper_pearson(wrong, total, inner)
        for error in clopper_pearson(base * size, size, inner)
    ]
    value = _corrected(wrong / total, base, classes)
    return Flips("judge", value, min(corners), max(corners), level, wrong / total, base, total)


def suspected_flips(logits: Tensor, labels: Tensor) -> Flips:
    """The share of labels that a learner confidently contradicts, of lower quality than a judge's.

    Args:
        logits: (n, K), of a learner that has not been trained on these pictures, if possible.
        labels: (n,) int64, the classes asked for.
    """
    joint = confident_joint(logits, labels)
    disagreement = float((logits.argmax(-1) != labels).double().mean())
    value = max(0.0, float(1.0 - joint.diagonal().sum()))
    return Flips("learner", value, None, None, None, disagreement, None, len(labels))


def confident_joint(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Estimated joint distribution of asked-for class (rows) and class shown: (K, K), sums to 1.

    A picture counts for class j when p_j is at least the mean p_j of the pictures labelled j; of
    several such classes the likeliest. Rows are then scaled to the number of pictures asked for. A
    class none of whose pictures counts is taken to be right.
    """
    p = torch.softmax(logits.double(), dim=-1).numpy()
    asked, classes = labels.numpy(), logits.shape[-1]
    count = np.bincount(asked, minlength=classes)
    sums = np.zeros(classes)
    np.add.at(sums, asked, p[np.arange(len(asked)), asked])
    threshold = np.where(count > 0, sums / np.maximum(count, 1), np.inf)
    confident = p >= threshold
    shown = np.where(confident, p, -1.0).argmax(axis=1)
    counted = confident.any(axis=1)
    joint = np.zeros((classes, classes))
    np.add.at(joint, (asked[counted], shown[counted]), 1.0)
    empty = joint.sum(axis=1) == 0
    joint[empty, empty] = 1.0
    joint *= (count / joint.sum(axis=1))[:, None]
    return joint / joint.sum()


def clopper_pearson(wrong: float, total: float, level: float) -> tuple[float, float]:
    """Exact binomial interval of `wrong` out of `total`, both of which may be fractions."""
    tail = 0.5 * (1.0 - level)
    low = float(stats.beta.ppf(tail, wrong, total - wrong + 1)) if wrong > 0 else 0.0
    high = float(stats.beta.ppf(1.0 - tail, wrong + 1, total - wrong)) if wrong < total else 1.0
    return low, high


def _corrected(disagreement: float, error: float, classes: int) -> float:
    """(D - e) / (1 - e K / (K - 1)), held in [0, 1]; its limit where e reaches chance."""
    chance = 1.0 - 1.0 / classes
    scale = 1.0 - error / chance
    if scale <= 0.0:
        return 0.0 if disagreement < chance else 1.0
    return min(max((disagreement - error) / scale, 0.0), 1.0)
