"""Guidance on a Gaussian, where the density it samples from has a closed form.

For a clean x0 ~ N(m, s^2) the exact denoiser is known. The learner's loss is made a polynomial l of
x0: its logits are (0, 60 + l), so that -log p_0 = 60 + l to 26 decimals. Sampling with weight
exp(omega l) then means

    l = a x0                  N(m + omega a s^2, s^2), whatever omega
    l = a x0 + b x0^2 / 2     1 / variance = 1 / s^2 - omega b, mean = variance (m / s^2 + omega a)

and the clean estimate at (x, t) of the first one is again known. Since E[exp(omega a x0) | x] is
exp(omega a x0_hat) times a constant, guidance by the estimate is exact there; for the second it is
exact to first order in omega.
"""

import pytest
import torch

from etude.diffusion.guidance import EntropyGuidance, GuidanceConfig
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample

MEAN, SPREAD, SLOPE = 0.7, 0.5, 1.3
OBJECTIVES = {
    "eps": Objective(ObjectiveConfig(prediction="eps", schedule="linear")),
    "v": Objective(ObjectiveConfig(prediction="v", schedule="linear")),
    "flow": Objective(ObjectiveConfig()),
}


def gaussian(objective: Objective, mean: float):
    """The exact denoiser of N(mean, SPREAD^2)."""

    def denoiser(x, t, condition):
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in objective.schedule.coefficients(t))
        total = alpha**2 * SPREAD**2 + sigma**2
        apart = x - alpha * mean
        clean, eps = mean + alpha * SPREAD**2 / total * apart, sigma / total * apart
        return objective.target(clean, eps, t)

    return denoiser


def guide_of(omega: float, slope: float, bend: float = 0.0) -> EntropyGuidance:
    def learner(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)[:, 0]
        value = slope * x + 0.5 * bend * x.square()
        return torch.stack((torch.zeros_like(value), 60.0 + value), dim=1)

    config = GuidanceConfig(mode="score", criterion="loss", omega=omega, every=1)
    return EntropyGuidance(config, learner, lambda x: x)


def normal_quantiles(count: int) -> torch.Tensor:
    """Starting points (count, 1, 1, 1) with the mean 0 of the noise, and nearly its variance."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(u).view(-1, 1, 1, 1)


def drawn(objective: Objective, guide: EntropyGuidance | None, steps: int) -> torch.Tensor:
    z = normal_quantiles(201)
    condition = {"labels": torch.zeros(len(z), dtype=torch.int64)}
    config = SamplerConfig(method="heun", steps=steps, guidance_convention="lambda")
    return sample(gaussian(objective, MEAN), objective, config, z, condition, guide=guide).flatten()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("omega", [0.01, 0.4, 3.0])
def test_one_evaluation_is_that_of_the_tilted_density(name: str, omega: float) -> None:
    objective = OBJECTIVES[name]
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    x = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64).view(4, 1, 1, 1)
    condition = {"labels": torch.zeros(4, dtype=torch.int64)}
    denoiser, leaf = gaussian(objective, MEAN), x.clone().requires_grad_()
    output = denoiser(leaf, t, condition)
    pushed = guide_of(omega, SLOPE).push(objective, leaf, output, t, condition)
    x0, eps = objective.clean(output.detach(), pushed.x, t)
    tilted = gaussian(objective, MEAN + omega * SLOPE * SPREAD**2)(x, t, condition)
    exact_x0, exact_eps = objective.clean(tilted, x, t)
    torch.testing.assert_close(x0 + pushed.by_x0, exact_x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(eps + pushed.by_eps, exact_eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m", "unipc", "heun", "heun_sigma", "ddpm"])
@pytest.mark.parametrize("name", ["eps", "v"])
def test_every_sampler_draws_as_from_the_tilted_density(name: str, method: str) -> None:
    """Step by step what the exact denoiser of the tilted density gives without guidance; a flow
    begins where the score says nothing."""
    objective, omega = OBJECTIVES[name], 0.8
    z = normal_quantiles(9)
    condition = {"labels": torch.zeros(len(z), dtype=torch.int64)}
    config = SamplerConfig(method=method, steps=12, guidance_convention="lambda")

    def points(mean: float, guide: EntropyGuidance | None) -> torch.Tensor:
        seen = []
        sample(
            gaussian(objective, mean), objective, config, z, condition, guide=guide,
            step_noise=lambda step: z.roll(step + 1, 0),
            progress=lambda done, x, x0: seen.extend((x, x0)),
        )  # fmt: skip
        return torch.stack(seen)

    tilted = points(MEAN + omega * SLOPE * SPREAD**2, None)
    torch.testing.assert_close(points(MEAN, guide_of(omega, SLOPE)), tilted, rtol=0, atol=1e-10)
    assert (points(MEAN, None) - tilted).abs().max() > 0.1


@pytest.mark.parametrize("name", ["v", "flow"])
@pytest.mark.parametrize("omega", [0.1, 1.0])
def test_samples_follow_the_tilted_density(name: str, omega: float) -> None:
    objective = OBJECTIVES[name]
    x, plain = drawn(objective, guide_of(omega, SLOPE), 60), drawn(objective, None, 60)
    shift = omega * SLOPE * SPREAD**2
    assert abs(float(plain.mean()) - MEAN) < 5e-3  # the table starts at alpha = 0.006, not at 0
    assert abs(float(x.mean() - plain.mean()) / shift - 1.0) < 0.01
    assert abs(float(x.std() / plain.std()) - 1.0) < 0.01


def test_a_bent_weight_tilts_mean_and_variance_to_first_order() -> None:
    """Derivatives by omega at 0: s^2 (a + b m) of the mean, s^4 b of the variance."""
    omega, bend = 1e-3, -2.0
    up, down = (drawn(OBJECTIVES["flow"], guide_of(omega, s, b), 60)
                for s, b in ((SLOPE, bend), (-SLOPE, -bend)))  # fmt: skip
    by_mean = float(up.mean() - down.mean()) / (2 * omega)
    by_variance = float(up.var() - down.var()) / (2 * omega)
    assert abs(by_mean / (SPREAD**2 * (SLOPE + bend * MEAN)) - 1.0) < 0.02
    assert abs(by_variance / (SPREAD**4 * bend) - 1.0) < 0.02
