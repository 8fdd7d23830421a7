"""MIND against its formula, unequal numbers against copies, and a closed form."""

import numpy as np
import pytest
import torch

import etude.metrics.mind as module
from etude.metrics.mind import mind, mind_of_subsets, sphere, squared_wasserstein
from etude.metrics.registry import METRICS, Pair


def cloud(count: int, seed: int, shift: float = 0.0, dim: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1.0, (count, dim)))


def test_it_is_the_formula_of_its_definition() -> None:
    x, y = cloud(31, 0).numpy(), cloud(31, 1, 0.5).numpy()
    along = sphere(np.arange(150), 6).numpy()
    gaps = np.sort(x @ along.T, axis=0) - np.sort(y @ along.T, axis=0)
    expected = 3 * 6 / (31 * 150) * (gaps**2).sum()
    assert mind(torch.from_numpy(x), torch.from_numpy(y), 150) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(4, 6), (5, 7), (3, 9), (8, 8)])
def test_unequal_numbers_are_copies_up_to_a_common_number(n: int, m: int) -> None:
    rng = np.random.default_rng(2)
    x, y = np.sort(rng.normal(size=(3, n))), np.sort(rng.normal(size=(3, m)))
    common = np.lcm(n, m)
    gaps = np.repeat(x, common // n, axis=1) - np.repeat(y, common // m, axis=1)
    found = squared_wasserstein(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(found, (gaps**2).mean(1), rtol=1e-12)


def test_blocks_of_rows_do_not_matter_and_ends_are_made_once(monkeypatch) -> None:
    x, y = cloud(31, 0).float(), cloud(17, 1, 0.5).float()
    expected = mind(x, y, 200)
    module._steps.cache_clear()
    monkeypatch.setattr(module, "_ROWS", 5)
    assert mind(x, y, 200) == pytest.approx(expected, rel=1e-12)
    assert module._steps.cache_info().misses == 1  # of four blocks of directions


def test_a_shift_counts_three_times_its_square() -> None:
    # W_2^2 along u is (u . s)^2, whose mean over the sphere is |s|^2 / D.
    x, shift = cloud(20, 3), torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 1.0], dtype=torch.float64)
    found = mind(x, x + shift, 4000)
    assert found == pytest.approx(3 * float(shift.square().sum()), rel=0.06)
    assert mind(x, x.clone(), 50) == 0.0


def test_directions_are_of_length_one_and_follow_from_their_positions() -> None:
    along = sphere(np.arange(100), 6)
    torch.testing.assert_close(along.norm(dim=1), torch.ones(100).double())
    assert torch.equal(sphere(np.array([70]), 6)[0], along[70])
    # Uniform: the mean of u u^T is the identity divided by D.
    many = sphere(np.arange(20_000), 6)
    torch.testing.assert_close(
        many.T @ many / 20_000, torch.eye(6).double() / 6, rtol=0, atol=0.006
    )


def test_subsets_have_the_distance_of_their_rows() -> None:
    x, y = cloud(25, 4), cloud(20, 5, 0.3)
    rng = np.random.default_rng(6)
    keep = [torch.from_numpy(rng.random((4, len(side))) < 0.6) for side in (x, y)]
    found = mind_of_subsets(x, y, *keep, 100)
    expected = [mind(x[one], y[two], 100) for one, two in zip(*keep, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    metric = METRICS.get("mind")
    pair = Pair(x, y, "inception", metric.options(directions=100))
    assert metric.values(pair, 1.0, *pair.everything())["MIND"][0] == mind(x, y, 100)
