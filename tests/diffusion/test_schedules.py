"""Schedules against float64 formulas of the papers and published end values."""

import math

import numpy as np
import pytest
import torch

from etude.diffusion.schedules import Schedule, posterior


def alpha_bar(name: str) -> np.ndarray:
    """The recursion of Ho et al. 2020 in plain numpy."""
    first, last = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[name]
    beta = np.linspace(first, last, 1000)
    if name == "scaled_linear":
        beta = np.linspace(np.sqrt(first), np.sqrt(last), 1000) ** 2
    return np.cumprod(1 - beta)


@pytest.mark.parametrize(("name", "end"), [("linear", 4.036e-5), ("scaled_linear", 4.660e-3)])
def test_tables_follow_the_recursion(name: str, end: float) -> None:
    schedule, expected = Schedule(name), alpha_bar(name)
    t = torch.arange(1000) / 1000
    assert torch.equal(schedule.index(t), torch.arange(1000))
    np.testing.assert_allclose(schedule.alpha(t), np.sqrt(expected), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - expected), rtol=1e-6)
    assert float(schedule.alpha(torch.tensor(1.0)) ** 2) == pytest.approx(end, rel=2e-3)


def test_the_cosine_table_is_nichol_and_dhariwal_s() -> None:
    """Betas of their alpha_bar, capped; the squared cosine itself wherever the cap is far away."""
    t = np.arange(1001) / 1000
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    capped = np.cumprod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    schedule, times = Schedule("cosine_table"), torch.arange(1000, dtype=torch.float64) / 1000
    np.testing.assert_allclose(schedule.alpha(times) ** 2, capped, rtol=1e-12)
    np.testing.assert_allclose(capped[:900], (bar[1:] / bar[0])[:900], rtol=1e-12)
    assert float(schedule.alpha(times)[-1] ** 2) == pytest.approx(bar[999] / bar[0] * 1e-3)
    rescaled = Schedule("cosine_table", zero_terminal_snr=True)
    assert rescaled.alpha(times)[-1] == 0.0 and rescaled.reaches_noise


def test_a_network_of_1000_steps_is_asked_by_the_published_index() -> None:
    schedule = Schedule("linear")
    entries = schedule.snap(torch.arange(1000) / 1000 + 0.0003)
    assert (entries * 1000.0 - torch.arange(1000)).abs().max() < 1e-4


def test_continuous_schedules() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    flow, cosine = Schedule("flow"), Schedule("cosine")
    torch.testing.assert_close(flow.alpha(t), torch.tensor([1.0, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(flow.sigma(t), t)
    root = math.sqrt(0.5)
    expected = torch.tensor([1.0, math.cos(math.pi / 8), root, 0.0])
    torch.testing.assert_close(cosine.alpha(t), expected)
    assert cosine.alpha(t)[-1] == 0.0
    torch.testing.assert_close(cosine.alpha(t) ** 2 + cosine.sigma(t) ** 2, torch.ones(4))


def test_zero_terminal_snr_ends_in_noise_and_keeps_the_start() -> None:
    plain, rescaled = Schedule("scaled_linear"), Schedule("scaled_linear", zero_terminal_snr=True)
    t = torch.arange(1000, dtype=torch.float64) / 1000
    alpha, before = rescaled.alpha(t), plain.alpha(t)
    assert alpha[-1] == 0.0 and rescaled.sigma(t)[-1] == 1.0
    assert float(alpha[0]) == pytest.approx(float(before[0]), rel=1e-12)
    ratio = (before - alpha) / (before[0] - before)[-1]  # an affine map of the roots
    expected = (
        before[-1] * (before[0] - before) / (before[0] - before[-1]) / (before[0] - before)[-1]
    )
    torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_shift_divides_the_signal_to_noise_amplitude(name: str) -> None:
    schedule = Schedule(name, shift=3.0)
    t = torch.tensor([0.1, 0.37, 0.9], dtype=torch.float64)
    ratio = schedule.alpha(t) / schedule.sigma(t)
    snapped = schedule.snap(t)
    shifted = schedule.alpha(snapped) / schedule.sigma(snapped)
    torch.testing.assert_close(shifted, ratio / 3.0, rtol=1e-12, atol=0)
    ends = schedule.snap(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_shift_of_a_table() -> None:
    t = torch.arange(1000, dtype=torch.float64) / 1000
    plain, shifted = Schedule("linear"), Schedule("linear", shift=2.0)
    expected = plain.alpha(t) / plain.sigma(t) / 2.0
    torch.testing.assert_close(shifted.alpha(t) / shifted.sigma(t), expected, rtol=1e-10, atol=0)


def test_uniform_times_fall_into_entries_evenly() -> None:
    schedule = Schedule("linear", steps=10)
    t = schedule.snap(torch.linspace(0, 1, 1001)[:-1])
    counts = torch.bincount(schedule.index(t), minlength=10)
    assert counts.min() >= 99 and counts.max() <= 101


def test_low_precision_times_are_read_in_float32() -> None:
    schedule = Schedule("scaled_linear")
    assert schedule.alpha(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32
    assert schedule.alpha(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float64


def test_posterior_is_bayes_rule() -> None:
    """Conditioning the joint Gaussian of (x_s, x_t) given x_0 gives the same mean and variance."""
    alpha, sigma, alpha_s, sigma_s = 0.3, 0.8, 0.7, 0.4  # not variance-preserving
    step = posterior(
        *(torch.tensor(v, dtype=torch.float64) for v in (alpha, sigma, alpha_s, sigma_s))
    )
    covariance = alpha / alpha_s * sigma_s**2
    x0, x = 1.7, -0.6
    mean = alpha_s * x0 + covariance / sigma**2 * (x - alpha * x0)
    assert float(step.variance) == pytest.approx(sigma_s**2 - covariance**2 / sigma**2, rel=1e-12)
    got = step.mean(torch.tensor(x0, dtype=torch.float64), torch.tensor(x, dtype=torch.float64))
    assert float(got) == pytest.approx(mean, rel=1e-12)


def test_posterior_of_a_table_is_ho_et_al() -> None:
    bar = alpha_bar("linear")
    index = np.array([1, 400, 999])
    beta = 1 - bar[index] / bar[index - 1]
    step = Schedule("linear").posterior(torch.from_numpy(index))
    np.testing.assert_allclose(step.largest, beta, rtol=1e-9)
    np.testing.assert_allclose(
        step.variance, beta * (1 - bar[index - 1]) / (1 - bar[index]), rtol=1e-9
    )
    np.testing.assert_allclose(
        step.from_x, np.sqrt(1 - beta) * (1 - bar[index - 1]) / (1 - bar[index]), rtol=1e-9
    )
    first = Schedule("linear").posterior(torch.tensor([0]))
    assert float(first.variance) == 0.0 and float(first.from_x) == 0.0
    assert float(first.from_x0) == pytest.approx(1.0)
