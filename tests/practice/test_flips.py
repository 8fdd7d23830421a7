"""Shares of flipped labels: exact populations, simulated coverage, and loops over pictures."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from etude.core.errors import UserError
from etude.practice.flips import (
    Judge,
    clopper_pearson,
    confident_joint,
    judged_flips,
    suspected_flips,
)
from etude.practice.pictures import Stored


def judge(wrong: list[int], count: list[int]) -> Judge:
    return Judge(lambda x: x, np.array(wrong), np.array(count))


def test_the_correction_recovers_the_share_of_an_exact_population() -> None:
    """4 classes, 12% mistakes spread evenly, 1000 pictures of each class, of which 200 flipped."""
    predicted, labels = [], []
    for asked in range(4):
        others = [c for c in range(4) if c != asked]
        shown_as = {asked: 800}
        for c in others:
            shown_as[c] = 200 / 3
        counts = {
            said: sum(n * (0.88 if said == c else 0.04) for c, n in shown_as.items())
            for said in range(4)
        }
        # 704 + 8 for the class asked for; 96 and each third of 192 for the others.
        assert counts[asked] == pytest.approx(712)
        predicted += [asked] * 712 + others * 96
        labels += [asked] * 1000
    found = judged_flips(judge([12] * 4, [100] * 4), np.array(predicted), np.array(labels))
    assert (found.disagreement, found.base) == (0.288, pytest.approx(0.12))
    assert found.value == pytest.approx(0.2, abs=1e-12)
    assert found.low < 0.2 < found.high and found.method == "judge" and found.pictures == 4000


def test_the_interval_comes_from_the_worst_corners() -> None:
    """Equal strata are one binomial; with two classes f = (D - e) / (1 - 2 e)."""
    labels = np.arange(200) % 2
    predicted = np.where(np.arange(200) < 50, 1 - labels, labels)
    found = judged_flips(judge([10, 10], [100, 100]), predicted, labels, level=0.9)
    d = stats.binomtest(50, 200).proportion_ci(0.95, method="exact")
    e = stats.binomtest(20, 200).proportion_ci(0.95, method="exact")
    assert found.value == pytest.approx((0.25 - 0.1) / 0.8)
    assert found.low == pytest.approx((d.low - e.high) / (1 - 2 * e.high))
    assert found.high == pytest.approx((d.high - e.low) / (1 - 2 * e.low))


def test_a_judge_that_may_be_mere_chance_leaves_the_share_open_below() -> None:
    """5 mistakes of 12 with two classes: e may be one half, where f falls without bound."""
    labels = np.arange(200) % 2
    predicted = np.where(np.arange(200) < 80, 1 - labels, labels)
    found = judged_flips(judge([2, 3], [6, 6]), predicted, labels)
    assert found.low == 0.0 == found.value < found.high < 1.0
    predicted = np.where(np.arange(200) < 180, 1 - labels, labels)
    assert judged_flips(judge([2, 3], [6, 6]), predicted, labels).high == 1.0


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize(("wrong", "total"), [(0, 7), (7, 7), (3, 7), (41, 300)])
def test_clopper_pearson_is_scipys(wrong: int, total: int, level: float) -> None:
    exact = stats.binomtest(wrong, total).proportion_ci(level, method="exact")
    assert clopper_pearson(wrong, total, level) == pytest.approx((exact.low, exact.high))


def test_the_base_error_is_that_of_the_classes_asked_for() -> None:
    one = judge([30, 0, 3], [60, 60, 30])
    labels = np.array([0] * 30 + [1] * 60 + [2] * 10)
    found = judged_flips(one, labels, labels)  # agrees with everything
    assert found.base == pytest.approx(0.3 * 0.5 + 0.1 * 0.1)
    assert (found.disagreement, found.value, found.low) == (0.0, 0.0, 0.0)
    only = judged_flips(one, np.zeros(40, int), np.ones(40, int))  # class 1 is never mistaken
    assert (only.base, only.value, only.high) == (0.0, 1.0, 1.0)
    assert only.low == pytest.approx(0.0125 ** (1 / 40))  # above chance f rises with e: e is 0
    # No mistake of 60 leaves an upper bound of 1 - tail^(1/60), as for 60 simple draws.
    few = judged_flips(one, np.repeat([0, 1], [10, 30]), np.ones(40, int))
    e, d = 1 - 0.0125 ** (1 / 60), stats.binomtest(10, 40).proportion_ci(0.975, method="exact")
    assert (few.low, few.high) == pytest.approx(((d.low - e) / (1 - 1.5 * e), d.high))


@pytest.mark.parametrize(("flipped", "error"), [(0.0, 0.02), (0.03, 0.08), (0.15, 0.2)])
def test_the_interval_covers_under_its_assumptions(flipped: float, error: float) -> None:
    chance = np.random.default_rng(7)
    classes, pictures, trials, hits, estimates = 5, 300, 300, 0, []

    def say(shown: np.ndarray) -> np.ndarray:
        """What a judge with even confusions calls pictures that show these classes."""
        other = (shown + chance.integers(1, classes, len(shown))) % classes
        return np.where(chance.random(len(shown)) < error, other, shown)

    for _ in range(trials):
        real = np.arange(250) % classes
        wrong = np.bincount(real[say(real) != real], minlength=classes)
        labels = np.arange(pictures) % classes
        moved = (labels + chance.integers(1, classes, pictures)) % classes
        shown = np.where(chance.random(pictures) < flipped, moved, labels)
        found = judged_flips(Judge(lambda x: x, wrong, np.full(5, 50)), say(shown), labels)
        hits += found.low <= flipped <= found.high
        estimates.append(found.value)
    assert hits / trials >= 0.95
    if flipped == 0.15:
        error_of_mean = np.std(estimates) / trials**0.5
        assert abs(np.mean(estimates) - flipped) < 4 * error_of_mean


class Levels(torch.nn.Module):
    """Says class 1 of light pictures; without weights."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def test_a_judge_is_measured_per_class_and_refused_when_it_cannot_judge() -> None:
    levels = np.array([0, 20, 200, 10, 255, 100, 90, 240])
    pixels = np.broadcast_to(levels[:, None, None, None], (8, 4, 4, 1)).astype(np.uint8)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = Judge.measured(Levels(), Stored(pixels, labels, ["dark", "light"]), 2)
    assert (found.wrong.tolist(), found.count.tolist()) == ([1, 2], [4, 4])
    with pytest.raises(UserError, match="J mistakes 62.5% of real pictures of 2 classes, no bett"):
        Judge.measured(Levels(), Stored(pixels, 1 - labels, ["light", "dark"]), 2, "J")
    with pytest.raises(UserError, match="J cannot be measured on class 2"):
        Judge.measured(Levels(), Stored(pixels, labels, ["dark", "light", "red"]), 3, "J")


def joint_by_loops(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    classes = p.shape[1]
    threshold = [
        np.mean([p[i, c] for i in range(len(p)) if labels[i] == c]) if c in labels else float("inf")
        for c in range(classes)
    ]
    counts = np.zeros((classes, classes))
    for i, row in enumerate(p):
        sure = [c for c in range(classes) if row[c] >= threshold[c]]
        if sure:
            counts[labels[i], max(sure, key=lambda c: row[c])] += 1
    joint = np.zeros((classes, classes))
    for c in range(classes):
        share = np.mean(labels == c)
        joint[c] = share * (counts[c] / counts[c].sum() if counts[c].sum() else np.eye(classes)[c])
    return joint


def test_the_confident_joint_is_a_count_over_pictures() -> None:
    chance = np.random.default_rng(1)
    for classes, pictures in ((3, 40), (6, 25), (4, 400)):
        logits = torch.from_numpy(2 * chance.normal(size=(pictures, classes)))
        labels = chance.integers(0, classes - 1, pictures)  # the last class is never asked for
        expected = joint_by_loops(torch.softmax(logits, 1).numpy(), labels)
        found = confident_joint(logits, torch.from_numpy(labels))
        assert np.allclose(found, expected, rtol=0, atol=1e-12)
        flips = suspected_flips(logits, torch.from_numpy(labels))
        assert flips.value == pytest.approx(1 - np.trace(expected), abs=1e-12)
        assert flips.disagreement == np.mean(logits.argmax(1).numpy() != labels)
        assert (flips.method, flips.low, flips.high) == ("learner", None, None)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_confident_disagreement_finds_planted_flips(share: float) -> None:
    """Three Gaussian classes, exact posteriors, labels flipped to any other class alike."""
    chance = np.random.default_rng(2)
    centres = 3.0 * np.eye(3)
    shown = np.arange(3000) % 3
    x = centres[shown] + chance.normal(size=(3000, 3))
    moved = (shown + chance.integers(1, 3, 3000)) % 3
    labels = np.where(chance.random(3000) < share, moved, shown)
    logits = torch.from_numpy(x @ centres.T)  # the classes have equal norms
    found = suspected_flips(logits, torch.from_numpy(labels))
    assert abs(found.value - share) < 0.03
