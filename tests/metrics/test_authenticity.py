"""AuthPct by hand, by its definition over all distances, and of subsets."""

import numpy as np
import pytest
import torch

from etude.metrics.authenticity import authentic
from etude.metrics.registry import METRICS, Pair


def cloud(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 5)))


def by_definition(train: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Alaa et al. 2022, section 3.3, over full distance matrices."""
    own = np.linalg.norm(train[:, None] - train[None], axis=2)
    np.fill_diagonal(own, np.inf)
    across = np.linalg.norm(generated[:, None] - train[None], axis=2)
    return across.min(1) > own.min(1)[across.argmin(1)]


def test_a_line_by_hand() -> None:
    train = torch.tensor([[0.0], [1.0], [4.0]])  # nearest others at 1, 1, 3
    generated = torch.tensor([[-0.5], [-2.0], [6.0], [8.0]])  # .5 < 1, 2 > 1, 2 < 3, 4 > 3
    assert authentic(generated, train).tolist() == [False, True, False, True]


def test_it_is_the_definition_and_copies_are_not_authentic() -> None:
    train, generated = cloud(80, 0), cloud(60, 1)
    expected = by_definition(train.numpy(), generated.numpy())
    assert 5 < expected.sum() < 55
    assert authentic(generated, train).tolist() == expected.tolist()
    assert not authentic(train[:20] + 1e-6, train).any()


def test_subsets_have_the_share_of_their_rows() -> None:
    train, generated = cloud(90, 2), cloud(70, 3)
    pair = Pair(train, generated, "inception")
    metric = METRICS.get("authenticity")
    order = np.random.default_rng(4)
    keep = [
        torch.from_numpy(np.argsort(order.random((5, count)), axis=1) < count // 2)
        for count in (90, 70)
    ]
    found = metric.values(pair, 0.5, *keep)["AuthPct"]
    for value, one, two in zip(found, *keep, strict=True):
        expected = by_definition(train[one].numpy(), generated[two].numpy())
        assert value == pytest.approx(100 * expected.mean())
    whole = metric.values(pair, 1.0, *pair.everything())["AuthPct"][0]
    assert whole == pytest.approx(100 * by_definition(train.numpy(), generated.numpy()).mean())
