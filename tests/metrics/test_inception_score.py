"""The Inception score by hand, by its definition, and of subsets."""

import numpy as np
import pytest
import torch

from etude.metrics.inception_score import inception_score, parts, score_of_subsets
from etude.metrics.registry import METRICS, Pair


def by_definition(logits: np.ndarray) -> float:
    """exp of the mean divergence from the mean, in nats."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def test_sure_pictures_of_c_classes_score_c_and_unsure_ones_one() -> None:
    sure = torch.eye(7).repeat(3, 1) * 1e4
    assert inception_score(sure, 1) == pytest.approx(7.0, rel=1e-12)
    assert inception_score(torch.zeros(20, 7), 1) == pytest.approx(1.0, rel=1e-12)


def test_parts_are_even_random_and_averaged() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (53, 6))
    part = parts(53, 4)
    assert sorted(part.bincount().tolist()) == [13, 13, 13, 14]
    assert not torch.equal(part, part.sort().values)
    expected = np.mean([by_definition(logits[part.numpy() == number]) for number in range(4)])
    assert inception_score(torch.from_numpy(logits), 4) == pytest.approx(expected, rel=1e-12)


def test_pictures_ordered_by_class_are_no_trouble() -> None:
    # In parts of consecutive rows each would hold one class alone and score one.
    logits = torch.eye(5).repeat_interleave(200, 0) * 50
    assert inception_score(logits, 5) > 4.9
    assert inception_score(logits, 5, mixed=False) == pytest.approx(1.0)


def test_subsets_and_the_name_of_the_network() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (40, 5))
    keep = torch.from_numpy(np.random.default_rng(2).random((3, 40)) < 0.7)
    found = score_of_subsets(torch.from_numpy(logits), keep, torch.zeros(40, dtype=torch.int64))
    expected = [by_definition(logits[one.numpy()]) for one in keep]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    metric = METRICS.get("inception_score")
    for features, name in (("mobilenet/logits", "Inception score (mobilenet)"),
                           ("inception/logits_unbiased", "Inception score")):  # fmt: skip
        pair = Pair(torch.zeros(0, 5), torch.from_numpy(logits), features, metric.options(splits=1))
        values = metric.values(pair, 1.0, *pair.everything())
        assert list(values) == [name]
        assert values[name][0] == pytest.approx(by_definition(logits), rel=1e-12)


def test_more_parts_than_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="10 parts"):
        inception_score(torch.zeros(4, 3))
