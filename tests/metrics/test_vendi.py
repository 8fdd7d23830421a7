"""The Vendi score of sets whose score is known, by both matrices, and of subsets."""

import numpy as np
import pytest
import torch

from etude.metrics.registry import METRICS, Pair
from etude.metrics.vendi import scores_of_subsets, vendi_score

ORDERS = [0.5, 1.0, 2.0, float("inf")]


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("copies", [1, 4])
def test_orthogonal_pictures_count_each_and_copies_once(q: float, copies: int) -> None:
    # Six directions: with four copies of each there are more rows than dimensions.
    x = torch.eye(9)[:6].repeat(copies, 1) * torch.rand(6 * copies, 1).add(0.5)
    assert vendi_score(x, q) == pytest.approx(6.0, rel=1e-6)


def test_uneven_kinds_follow_their_shares() -> None:
    # Shares 3/4 and 1/4 of two orthogonal kinds are the eigenvalues.
    x = torch.eye(3)[[0, 0, 0, 1]]
    p = np.array([0.75, 0.25])
    assert vendi_score(x) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-12)
    assert vendi_score(x, 2.0) == pytest.approx(1 / float((p**2).sum()), rel=1e-12)
    assert vendi_score(x, float("inf")) == pytest.approx(1 / 0.75, rel=1e-12)


@pytest.mark.parametrize("count", [20, 90])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_subsets_have_the_score_of_their_rows(count: int, share: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(count, 24)))
    order = np.argsort(np.random.default_rng(1).random((3, count)), axis=1)
    keep = torch.from_numpy(order < round(share * count))
    found = scores_of_subsets(x, keep, 1.0)
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    for value, one in zip(found, keep.numpy(), strict=True):
        values = np.linalg.eigvalsh(unit[one] @ unit[one].T / one.sum())
        values = values[values > 1e-12]
        assert value == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


@pytest.mark.parametrize("q", [*ORDERS, 0.0])
@pytest.mark.parametrize("count", [2, 9])
def test_rows_without_a_direction_are_one_more_kind(count: int, q: float) -> None:
    """Black pictures are like each other and unlike all others, as a direction of their own is."""
    x = torch.eye(5)[:1].repeat(count, 1)
    assert vendi_score(x * 1e-5, q) == pytest.approx(1.0)
    assert vendi_score(torch.zeros(count, 5), q) == pytest.approx(1.0)
    other = x.clone()
    x[1], other[1] = 0.0, torch.eye(5)[1]
    assert vendi_score(x, q) == pytest.approx(vendi_score(other, q))
    if count == 2:  # two equal eigenvalues: influences on the largest are not defined
        return
    metric, keep = METRICS.get("vendi"), torch.ones(count, dtype=torch.bool)
    found = [
        metric.influences(Pair(x[:0], one, "dinov2", metric.options(q=q)), keep[:0], keep)
        for one in (x, other)
    ]
    ((_, mine),), ((_, theirs),) = (one.values() for one in found)
    torch.testing.assert_close(mine, theirs)


def test_the_registered_figure_needs_no_real_side() -> None:
    metric = METRICS.get("vendi")
    assert not metric.needs_real and metric.better_of("any") == "higher"
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(30, 6)))
    pair = Pair(torch.zeros(0, 6), x, "dinov2", metric.options(q=2.0))
    ((name, value),) = metric.values(pair, 1.0, *pair.everything()).items()
    assert name == "Vendi score (dinov2 features, q=2)"
    assert value[0] == vendi_score(x, 2.0)
