"""Samplers on Gaussian data, where the exact denoiser and the exact solution are known.

For x_0 ~ N(mean, spread^2) the posterior mean gives the best prediction at every time, and the
probability-flow equation carries noise z at pure noise to mean + spread * z.
"""

import math

import pytest
import torch

from etude.core.errors import UserError
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample, time_grid

MEAN, SPREAD = 0.7, 0.4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**fields) -> SamplerConfig:
    return SamplerConfig(**{"guidance_convention": "one_plus_lambda"} | fields)


def objective(**fields) -> Objective:
    return Objective(ObjectiveConfig(**fields))


def exact_denoiser(target: Objective, mean: float = MEAN, spread: float = SPREAD):
    """The best prediction for N(mean, spread^2) data, through the objective's own target."""

    def denoiser(x, t, condition):
        alpha = target.schedule.alpha(t).view(-1, 1, 1, 1)
        sigma = target.schedule.sigma(t).view(-1, 1, 1, 1)
        total = alpha**2 * spread**2 + sigma**2
        clean = mean + alpha * spread**2 / total * (x - alpha * mean)
        noise = sigma / total * (x - alpha * mean)
        return target.target(clean, noise, t)

    return denoiser


CONTINUOUS = [
    {"prediction": "flow"},
    {"prediction": "v", "schedule": "cosine"},
    {"prediction": "v"},
]


@pytest.mark.parametrize("fields", CONTINUOUS, ids=str)
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2)])
def test_order_of_convergence(fields: dict, method: str, order: int) -> None:
    target, z = objective(**fields), draw(8, 1, 2, 2)

    def error(steps: int) -> float:
        x = sample(exact_denoiser(target), target, config(method=method, steps=steps), z, {})
        return float((x - (MEAN + SPREAD * z)).abs().mean())

    measured = math.log2(error(40) / error(80))
    assert measured == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_mean_and_variance_of_gaussian_data(method: str) -> None:
    target, z = objective(), draw(4000, 1, 2, 2, seed=3)
    x = sample(exact_denoiser(target), target, config(method=method, steps=200), z, {})
    standard_error = SPREAD / math.sqrt(x.numel())
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * standard_error)
    assert float(x.std()) == pytest.approx(SPREAD, abs=4 * standard_error)


def ancestral_moments(target: Objective, options: SamplerConfig) -> tuple[float, float]:
    """Mean and variance of the result, step by step, from the textbook posterior."""
    times = torch.tensor(time_grid(target, options)[:-1], dtype=torch.float64)
    alphas, sigmas = target.schedule.alpha(times).tolist(), target.schedule.sigma(times).tolist()
    points = [*zip(alphas, sigmas, strict=True), (1.0, 0.0)]
    mean, variance = 0.0, 1.0
    for (a, s), (b, r) in zip(points, points[1:], strict=False):
        gain = a * SPREAD**2 / (a**2 * SPREAD**2 + s**2)  # of x_0's posterior mean
        forward = s**2 - (a / b) ** 2 * r**2
        from_x0, from_x = b * forward / s**2, (a / b) * r**2 / s**2
        slope = from_x0 * gain + from_x
        mean = slope * mean + from_x0 * MEAN * (1 - gain * a)
        variance = slope**2 * variance + forward * r**2 / s**2
    return mean, variance


@pytest.mark.parametrize(
    "fields", [{"prediction": "eps", "schedule": "linear"}, {"prediction": "flow"}], ids=str
)
def test_ancestral_sampling_follows_its_own_recursion(fields: dict) -> None:
    """The map is affine in x and the noise; its mean and variance obey a recursion in floats."""
    target, steps = objective(**fields), 25
    options = config(method="ddpm", steps=steps)
    z = draw(20000, 1, 1, 2, seed=4)
    x = sample(
        exact_denoiser(target), target, options, z, {},
        step_noise=lambda step: draw(20000, 1, 1, 2, seed=100 + step),
    )  # fmt: skip

    mean, variance = ancestral_moments(target, options)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / x.numel()))
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / x.numel()))
    mean, variance = ancestral_moments(target, config(method="ddpm", steps=1000))
    assert mean == pytest.approx(MEAN, rel=0.02)
    assert math.sqrt(variance) == pytest.approx(SPREAD, rel=0.02)


def test_orders_of_convergence_between_entries_of_a_table() -> None:
    """To the clean point all take the same last step; against many steps."""
    target, z = objective(prediction="v", schedule="scaled_linear"), draw(8, 1, 2, 2)

    def result(steps: int, method: str) -> torch.Tensor:
        last = target.last_time
        # Entries that halve with the steps, so that every grid ends at the same entry.
        times = [last - i * (last - 0.007) / steps for i in range(steps + 1)] + [0.0]
        return sample(exact_denoiser(target), target, config(method=method), z, {}, times=times)

    exact = result(496, "heun_sigma")
    errors = {
        method: [float((result(n, method) - exact).abs().mean()) for n in (62, 124)]
        for method in ("ddim", "heun_sigma", "dpmpp_2m", "unipc")
    }
    ratios = {method: coarse / fine for method, (coarse, fine) in errors.items()}
    assert ratios["ddim"] < 2.1 and ratios["heun_sigma"] > 3.7
    assert ratios["unipc"] > 3.7 and ratios["unipc"] > ratios["dpmpp_2m"] > 3.0
    assert errors["unipc"][1] < errors["dpmpp_2m"][1]
    with pytest.raises(UserError, match="set method: heun"):
        sample(coupled, objective(), config(method="heun_sigma"), z, {})


@pytest.mark.parametrize("steps", [25, 250])
def test_respaced_ancestral_sampling_is_the_published_one(steps: int) -> None:
    """Nichol and Dhariwal's: entries at even real strides, betas of those alone, their posterior.

    With the learned variance between the logarithms of its two bounds, and no noise at the last.
    """
    target = objective(prediction="eps", schedule="linear", variance="learned_range")
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += 999 / (steps - 1)
    spaced = bar[kept]
    before = torch.cat((torch.ones(1, dtype=torch.float64), spaced[:-1]))
    beta = 1 - spaced / before
    tilde = beta * (1 - before) / (1 - spaced)
    asked = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(float(t[0]) * 1000)
        first = 0.9 * x + 0.1 * torch.sin(3 * x.roll(1, -1) + 2 * t.view(-1, 1, 1, 1))
        return torch.cat((first, torch.tanh(2 * x)), 1)

    x = z = draw(2, 1, 3, 3)
    for i in reversed(range(steps)):
        eps, v = network(x, torch.full((2,), kept[i] / 1000, dtype=torch.float64)).chunk(2, 1)
        clean = (x - (1 - spaced[i]).sqrt() * eps) / spaced[i].sqrt()
        mean = before[i].sqrt() * beta[i] / (1 - spaced[i]) * clean
        mean = mean + (1 - beta[i]).sqrt() * (1 - before[i]) / (1 - spaced[i]) * x
        share = (v + 1) / 2
        spread = torch.exp(0.5 * (share * beta[i].log() + (1 - share) * tilde[max(i, 1)].log()))
        x = mean + (spread * draw(2, 1, 3, 3, seed=steps - i) if i else 0.0)
    by_hand, asked = asked, []
    got = sample(
        lambda x, t, condition: network(x, t), target, config(method="ddpm", steps=steps), z, {},
        step_noise=lambda step: draw(2, 1, 3, 3, seed=step + 1),
    )  # fmt: skip
    assert asked == pytest.approx(by_hand, abs=1e-9) and by_hand[0] == pytest.approx(999)
    torch.testing.assert_close(got, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fields", [{}, {"prediction": "v", "schedule": "linear"}], ids=str)
def test_ddim_with_all_its_noise_is_ancestral(fields: dict) -> None:
    target, z = objective(**fields), draw(2, 1, 3, 3)

    def result(**options) -> torch.Tensor:
        return sample(
            exact_denoiser(target), target, config(steps=9, **options), z, {},
            step_noise=lambda step: draw(2, 1, 3, 3, seed=step + 1),
        )  # fmt: skip

    ancestral = result(method="ddpm")
    torch.testing.assert_close(result(eta=1.0), ancestral, rtol=1e-9, atol=1e-9)
    assert (result(eta=0.5) - ancestral).abs().max() > 1e-2


def test_ddim_is_euler_on_the_flow_schedule() -> None:
    target, z = objective(), draw(3, 2, 4, 4)

    def denoiser(x, t, condition):
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1) * x.roll(1, -1)

    x, steps = z, 7
    for step in range(steps):
        t = torch.full((3,), 1 - step / steps, dtype=torch.float64)
        x = x - denoiser(x, t, {}) / steps
    got = sample(denoiser, target, config(steps=steps), z, {})
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["ddim", "heun", "unipc", "ddpm"])
def test_the_result_is_the_last_clean_estimate(method: str) -> None:
    target, z, seen = objective(prediction="v", schedule="cosine"), draw(2, 1, 3, 3), []
    x = sample(
        exact_denoiser(target), target, config(method=method, steps=4), z, {},
        step_noise=lambda step: draw(2, 1, 3, 3, seed=step),
        progress=lambda done, x, x0: seen.append((done, x, x0)),
    )  # fmt: skip
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(x, seen[-1][1]) and torch.equal(x, seen[-1][2])
    assert not torch.equal(seen[0][1], seen[0][2])


def coupled(x: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
    """A nonlinear denoiser with a label; rows stay apart, pixels do not."""
    wave = torch.sin(2 * x + condition["labels"].view(-1, 1, 1, 1))
    return wave + x.roll(1, -1) * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("method", ["ddim", "heun", "unipc", "ddpm"])
def test_rows_do_not_influence_each_other(method: str) -> None:
    target, z, labels = objective(), draw(5, 2, 3, 3), torch.arange(5)
    options = config(method=method, steps=6, guidance_scale=2.5)

    def run(rows: list[int]) -> torch.Tensor:
        return sample(
            coupled, target, options, z[rows], {"labels": labels[rows]},
            nulls=[{"labels": torch.full((len(rows),), 9)}],
            step_noise=lambda step: draw(5, 2, 3, 3, seed=step)[rows],
        )  # fmt: skip

    together = run([0, 1, 2, 3, 4])
    torch.testing.assert_close(run([3]), together[[3]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run([4, 0]), together[[4, 0]], rtol=1e-12, atol=1e-12)


def test_classifier_free_guidance_in_both_conventions() -> None:
    target, z, labels = objective(), draw(3, 4, 2, 2), torch.tensor([0, 1, 2])
    condition, null = {"labels": labels}, {"labels": torch.full((3,), 7)}
    calls = []

    def denoiser(x, t, condition):
        calls.append(len(x))
        return coupled(x, t, condition)

    def run(**fields) -> torch.Tensor:
        return sample(denoiser, target, config(steps=1, **fields), z, condition, nulls=[null])

    t = torch.ones(3, dtype=torch.float64)
    cond, uncond = coupled(z, t, condition), coupled(z, t, null)
    expected = z - (uncond + 4.0 * (cond - uncond))
    torch.testing.assert_close(run(guidance_scale=4.0), expected)
    torch.testing.assert_close(run(guidance_scale=3.0, guidance_convention="lambda"), expected)
    assert calls == [6, 6]  # one batched call each
    plain = z - cond
    for fields in (
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "guidance_convention": "lambda"},
    ):
        assert torch.equal(run(**fields), plain)
    assert calls[2:] == [3, 3, 3]
    three = run(guidance_scale=4.0, guidance_channels=3)
    torch.testing.assert_close(three[:, :3], expected[:, :3])
    torch.testing.assert_close(three[:, 3:], plain[:, 3:])


def test_nested_conditions_are_doubled_too() -> None:
    target, z = objective(), draw(2, 1, 2, 2)
    condition = {"labels": torch.tensor([1.0, 2.0]), "control": {"size": torch.tensor([3.0, 4.0])}}
    null = {"labels": torch.zeros(2), "control": {"size": torch.tensor([3.0, 4.0])}}

    def denoiser(x, t, condition):
        factor = condition["labels"] * condition["control"]["size"]
        return x * factor.view(-1, 1, 1, 1)

    options = config(steps=1, guidance_scale=3.0)
    got = sample(denoiser, target, options, z, condition, nulls=[null])
    torch.testing.assert_close(got, z - 3.0 * z * torch.tensor([3.0, 8.0]).view(2, 1, 1, 1))


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_two_scales_of_guidance(method: str) -> None:
    """p(0, 0) + beta (p(0, c) - p(0, 0)) + lambda (p(s, c) - p(0, c)), at every evaluation."""
    target, z = objective(), draw(3, 2, 2, 2)
    condition = {"labels": torch.tensor([0, 1, 2]), "size": torch.tensor([1.0, 2.0, 3.0])}
    middle = condition | {"labels": torch.full((3,), 7)}
    bottom = middle | {"size": torch.zeros(3)}
    calls = []

    def denoiser(x, t, condition):
        calls.append(len(x))
        return coupled(x, t, condition) + torch.cos(x) * condition["size"].view(-1, 1, 1, 1)

    def combined(beta: float, scale: float):
        def single(x, t, given):
            full, control, none = (denoiser(x, t, c) for c in (condition, middle, bottom))
            return none + beta * (control - none) + scale * (full - control)

        return single

    def run(**fields) -> torch.Tensor:
        return sample(
            denoiser, target, config(method=method, steps=3, **fields), z, condition,
            nulls=[middle, bottom],
        )  # fmt: skip

    for beta, scale in ((2.5, 4.0), (0.0, 1.5), (3.0, 1.0)):
        calls.clear()
        got = run(control_scale=beta, guidance_scale=scale)
        assert set(calls) == {9}
        expected = sample(combined(beta, scale), target, config(method=method, steps=3), z, {})
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    other = {"control_scale": 1.5, "guidance_scale": 3.0, "guidance_convention": "lambda"}
    torch.testing.assert_close(run(**other), run(control_scale=2.5, guidance_scale=4.0))
    calls.clear()
    plain = run(guidance_scale=4.0)
    assert torch.equal(run(guidance_scale=4.0, control_scale=1.0), plain)
    assert set(calls) == {6}
    with pytest.raises(ValueError, match="2 conditions that ask for less and less, not 1"):
        sample(
            denoiser, target, config(guidance_scale=2.0, control_scale=2.0), z, condition,
            nulls=[middle],
        )  # fmt: skip


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_power_cosine_guidance(method: str) -> None:
    """w(t) = (w - 1) (1 - cos(pi (1 - t)^p)) / 2 + 1 at the time of every evaluation."""
    target, z = objective(), draw(3, 2, 2, 2)
    condition, null = {"labels": torch.tensor([0, 1, 2])}, {"labels": torch.full((3,), 7)}

    def single(x, t, given):
        weight = (3.8 - 1) * (1 - math.cos(math.pi * (1 - float(t[0])) ** 4)) / 2 + 1
        full, none = coupled(x, t, condition), coupled(x, t, null)
        return none + weight * (full - none)

    rising = {"guidance_scale": 3.8, "guidance_power": 4.0}
    got = sample(
        coupled, target, config(method=method, steps=6, **rising), z, condition, nulls=[null]
    )
    expected = sample(single, target, config(method=method, steps=6), z, {})
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    options = config(guidance_power=4.0, guidance_scale=3.0, control_scale=2.0)
    assert options.weights_at(1.0) == (0.0, 0.0) and options.weights_at(0.0) == (2.0, 1.0)
    half = options.weights_at(1 - 2 ** (-1 / 4))
    assert half == pytest.approx((1.0, 0.5))


def test_guidance_acts_in_its_interval_alone() -> None:
    target, z = objective(), draw(2, 1, 2, 2)
    calls = []

    def denoiser(x, t, condition):
        calls.append((round(float(t[0]), 6), len(x)))
        return coupled(x, t, condition)

    options = config(steps=5, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    labels = {"labels": torch.zeros(2)}
    sample(denoiser, target, options, z, labels, nulls=[labels])
    assert calls == [(1.0, 2), (0.8, 2), (0.6, 4), (0.4, 4), (0.2, 2)]


def test_grids() -> None:
    table = objective(prediction="eps", schedule="linear")

    def entries(**fields) -> list[int]:
        *times, last = time_grid(table, config(**fields))
        assert last == 0.0
        return [round(t * 1000) for t in times]

    assert entries(steps=4) == [999, 666, 333, 0]
    assert entries(steps=4, spacing="leading") == [750, 500, 250, 0]
    assert entries(steps=4, spacing="trailing") == [999, 749, 499, 249]
    assert entries(steps=1) == [999]
    published = [round(999 / 249 * i) for i in range(249, -1, -1)]  # DiT's 250 of 1000
    assert entries(steps=250) == published
    assert time_grid(objective(), config(steps=4)) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = time_grid(objective(), config(steps=4, shift=3.0))
    assert shifted == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    # Shifted or not, an eps prediction is asked at no time beyond the last it was trained at.
    noise = Objective(ObjectiveConfig(prediction="eps", schedule="flow", shift=3.0))
    assert time_grid(noise, config(steps=4))[0] == noise.last_time
    for fields in ({"steps": 1001}, {"shift": 3.0}):
        with pytest.raises(UserError, match="do not fit a table of 1000 entries"):
            time_grid(table, config(**fields))
    with pytest.raises(UserError, match="set spacing: linspace"):
        time_grid(objective(), config(spacing="leading"))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="guidance_convention"):
        SamplerConfig()
    with pytest.raises(ValueError, match="no effect without guidance_scale"):
        config(guidance_channels=3)
    for field in ("control_scale", "guidance_power"):
        with pytest.raises(ValueError, match=f"{field}.*no effect without guidance_scale"):
            config(**{field: 2.0})
    with pytest.raises(ValueError, match="eta has no effect on method 'heun'"):
        config(method="heun", eta=0.5)
    with pytest.raises(ValueError, match="needs step_noise"):
        sample(coupled, objective(), config(eta=0.5), draw(1, 1, 2, 2), {})
    with pytest.raises(ValueError, match="low < high"):
        config(guidance_scale=2.0, guidance_interval=(0.7, 0.3))
    with pytest.raises(ValueError, match="needs step_noise"):
        sample(coupled, objective(), config(method="ddpm"), draw(1, 1, 2, 2), {})
    with pytest.raises(ValueError, match="needs nulls"):
        sample(coupled, objective(), config(guidance_scale=2.0), draw(1, 1, 2, 2), {})
