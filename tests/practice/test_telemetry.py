"""A round's report against numbers worked out from the pictures themselves."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from etude.practice.flips import Judge
from etude.practice.pictures import Stored
from etude.practice.telemetry import (
    errors_by_round,
    guidance_effect,
    hardest,
    histogram,
    report_round,
    write_png,
)


class Brightness(nn.Module):
    """Two classes, dark and light; P(light) is a logistic function of the mean level."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.gain * x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def p_light(levels: np.ndarray, gain: float = 2.0) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-2.0 * gain * (np.asarray(levels) / 127.5 - 1.0)))


def entropies(levels: np.ndarray) -> np.ndarray:
    p = p_light(levels)
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def even(levels: np.ndarray) -> np.ndarray:
    """Pictures (n, 4, 4, 1) of one level each."""
    return np.broadcast_to(np.asarray(levels)[:, None, None, None], (len(levels), 4, 4, 1)).astype(
        np.uint8
    )


START = np.array([10, 240, 30, 220, 50, 200, 70, 180])
FIRST = np.array([90, 160, 150, 170, 101, 111])
SECOND = np.array([120, 130, 100, 90, 140, 128])
LEVELS, ENDS = np.concatenate([START, FIRST, SECOND]), [8, 14, 20]
POOL = Stored(even(LEVELS), np.arange(20) % 2, ["dark", "light"])


def test_a_rounds_report_is_what_the_pictures_say(tmp_path) -> None:
    twins = (np.array([14, 16, 19]), even(np.array([110, 60, 220])))
    report = report_round(
        tmp_path, 2, Brightness().eval(), POOL, ENDS, twins, gallery=4, distance=3.0
    )
    assert report == json.loads((tmp_path / "002.json").read_text())
    assert (report["round"], report["samples"], report["probe"]) == (2, 20, 3)
    assert report["entropy"] == pytest.approx(entropies(SECOND).mean(), abs=1e-6)
    # Light is said of levels above 127.5; the labels are dark and light in turn.
    assert report["agreement"] == 4 / 6
    assert report["error_by_round"] == pytest.approx([0.0, 2 / 6, 2 / 6])
    guided, unguided = entropies([120, 100, 128]), entropies([110, 60, 220])
    assert report["probe_entropy_guided"] == pytest.approx(guided.mean(), abs=1e-6)
    assert report["probe_entropy_unguided"] == pytest.approx(unguided.mean(), abs=1e-6)
    assert report["probe_raised"] == 1.0
    assert report["probe_agreement_guided"] == report["probe_agreement_unguided"] == 1.0
    # Levels 128, 130, 120, 140: the order of the distance from the middle.
    assert [one["index"] for one in report["hardest"]] == [19, 15, 14, 18]
    assert [one["taken_for"] for one in report["hardest"]] == [1, 1, 0, 1]
    assert [one["label"] for one in report["hardest"]] == [1, 1, 0, 0]
    # 90 repeats 90 of round 1, 101 and 100 are one level apart, 130 and 128 two.
    assert report["duplicates"]["near_earlier"] == 2 / 6
    assert report["duplicates"]["exact_earlier"] == 1 / 6
    assert report["duplicates"]["near_within"] == 1 / 6
    assert report["duplicates"]["pairs"] == [[17, 8, 0.0], [16, 12, 1.0], [19, 15, 2.0]]

    def spread(levels: np.ndarray, labels: np.ndarray) -> float:
        squares = []
        for label in (0, 1):
            own = levels[labels == label].astype(float)
            gaps = np.subtract.outer(own, own)[np.triu_indices(len(own), 1)]
            squares.append((gaps**2).mean())
        return math.sqrt(np.mean(squares))

    turn = np.arange(8) % 2
    assert report["spread"]["start"] == pytest.approx(spread(START, turn), rel=1e-5)
    assert report["spread"]["new"] == pytest.approx(spread(SECOND, turn[:6]), rel=1e-5)


def test_the_start_has_a_report_too_and_twins_may_be_missing(tmp_path) -> None:
    report = report_round(tmp_path, 0, Brightness().eval(), POOL, [8])
    assert report["entropy"] == pytest.approx(entropies(START).mean(), abs=1e-6)
    assert report["error_by_round"] == [0.0]
    assert report["duplicates"]["earlier"] == 0 and "probe" not in report
    assert report["spread"]["new"] == report["spread"]["start"]


def test_a_judge_takes_the_place_of_the_learners_suspicion(tmp_path) -> None:
    learner = Brightness().eval()
    suspicion = report_round(tmp_path, 2, learner, POOL, ENDS)["flips"]
    assert suspicion["method"] == "learner" and suspicion["disagreement"] == pytest.approx(2 / 6)

    def judge_says(x: Tensor) -> Tensor:
        """Its border is at level 95: it takes 90 for dark and the rest of the round for light."""
        mean = x.mean(dim=(1, 2, 3)) + 1.0 - 95 / 127.5
        return torch.stack([-mean, mean], dim=1)

    judge = Judge(judge_says, np.array([5, 5]), np.array([100, 100]))
    flips = report_round(tmp_path, 2, learner, POOL, ENDS, judge=judge)["flips"]
    # Labels dark, light in turn: 120, 100 and 140 are light to it, and 90 is dark.
    assert flips["method"] == "judge" and flips["disagreement"] == pytest.approx(4 / 6)
    assert flips["value"] == pytest.approx((4 / 6 - 0.05) / 0.9)


def test_guidance_that_lowers_entropy_shows_as_such() -> None:
    """Equal to its twins nothing was raised; with the roles exchanged the signs are exchanged."""
    chance = np.random.default_rng(0)
    wide, narrow = (torch.from_numpy(s * chance.normal(size=(9, 4))) for s in (0.3, 6.0))
    labels, indices = torch.arange(9) % 4, np.arange(100, 109)
    up = guidance_effect(wide, labels, indices, indices, narrow)
    down = guidance_effect(narrow, labels, indices, indices, wide)
    assert up["probe_entropy_guided"] > up["probe_entropy_unguided"] + 0.5
    assert up["probe_raised"] == 1.0 and down["probe_raised"] == 0.0
    assert up["probe_entropy_guided"] == down["probe_entropy_unguided"] == up["entropy"]
    assert up["probe_histogram_unguided"] == down["entropy_histogram"]
    assert guidance_effect(wide, labels, indices, indices, wide)["probe_raised"] == 0.0


def test_a_histogram_counts_every_entropy_once() -> None:
    values = np.random.default_rng(1).uniform(0, math.log(7), 500)
    expected, _ = np.histogram(values, bins=20, range=(0.0, math.log(7)))
    assert histogram(torch.from_numpy(values), 7) == expected.tolist()
    ends = torch.tensor([-1e-9, 0.0, math.log(7), math.log(7) * (1 + 1e-6)], dtype=torch.float64)
    assert histogram(ends, 7, bins=4) == [2, 0, 0, 2]


def test_errors_by_round_drift_with_the_learner() -> None:
    """A border that moves from one side of a round's pictures to the other turns their error."""
    levels = np.repeat([60, 100, 140], 50)
    pool = Stored(even(levels), np.ones(150, np.int64), ["dark", "light"])
    ends = [50, 100, 150]
    assert errors_by_round(Brightness().eval(), pool, ends, 7) == [1.0, 1.0, 0.0]
    assert errors_by_round(Brightness(-2.0).eval(), pool, ends, 7) == [0.0, 0.0, 1.0]


def test_errors_are_measured_across_a_round_and_not_at_its_start() -> None:
    levels = np.where(np.arange(100) < 50, 60, 200)
    pool = Stored(even(levels), np.ones(100, np.int64), ["dark", "light"])
    assert errors_by_round(Brightness().eval(), pool, [100], 10) == [0.5]


def test_the_gallery_shows_the_pictures_it_names(tmp_path) -> None:
    chance = np.random.default_rng(2)
    images = chance.integers(0, 256, (11, 5, 5, 3), dtype=np.uint8)
    write_png(tmp_path / "sheet.png", images, columns=4)
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())))
    assert sheet.shape == (3 * 6 + 1, 4 * 6 + 1, 3)
    for place, image in enumerate(images):
        top, left = 6 * (place // 4) + 1, 6 * (place % 4) + 1
        assert np.array_equal(sheet[top : top + 5, left : left + 5], image)
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.1], [0.0, 9.0]])
    named = hardest(np.array([7, 8, 9]), logits, torch.tensor([1, 1, 0]), np.array([1, 0]))
    assert [(one["index"], one["label"], one["taken_for"]) for one in named] == [
        (8, 1, 1),
        (7, 1, 0),
    ]
    p = 1 / (1 + math.exp(-2.0))
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert named[1]["entropy"] == pytest.approx(expected, abs=1e-6)
