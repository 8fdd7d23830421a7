"""Objectives against float64 closed forms and torch.distributions."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal, kl_divergence

from etude.core import rng
from etude.core.errors import UserError
from etude.diffusion.objectives import Noise, Objective, ObjectiveConfig, learned_log_variance

SETTINGS = [
    {"prediction": "flow"},
    {"prediction": "flow", "schedule": "linear"},
    {"prediction": "eps", "schedule": "linear"},
    {"prediction": "eps", "schedule": "cosine"},
    {"prediction": "eps"},
    {"prediction": "v", "schedule": "cosine"},
    {"prediction": "v"},
    {"prediction": "v", "schedule": "scaled_linear", "zero_terminal_snr": True},
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def closed_form(prediction: str, alpha: float, sigma: float, x0: float, eps: float) -> float:
    return {"flow": eps - x0, "eps": eps, "v": alpha * eps - sigma * x0}[prediction]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_noise_and_target_are_the_closed_forms(setting: dict) -> None:
    objective = Objective(ObjectiveConfig(**setting))
    x0, eps, t = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1), objective.times(torch.rand(4).double())
    x, target = objective.noise(x0, eps, t), objective.target(x0, eps, t)
    for b in range(4):
        alpha = float(objective.schedule.alpha(t[b]))
        sigma = float(objective.schedule.sigma(t[b]))
        torch.testing.assert_close(x[b], alpha * x0[b] + sigma * eps[b])
        expected = closed_form(setting["prediction"], alpha, sigma, x0[b], eps[b])
        torch.testing.assert_close(target[b], expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_perfect_prediction_gives_back_what_was_mixed(setting: dict) -> None:
    objective = Objective(ObjectiveConfig(**setting))
    x0, eps = draw(5, 2, 3, 3), draw(5, 2, 3, 3, seed=1)
    ends = torch.tensor([0.01, 0.3, 0.6, 0.9, objective.last_time], dtype=torch.float64)
    clean, noise = objective.clean(
        objective.target(x0, eps, ends), objective.noise(x0, eps, ends), ends
    )
    torch.testing.assert_close(clean, x0, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(noise, eps, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_losses_are_per_sample_means_and_zero_at_the_target(setting: dict) -> None:
    objective = Objective(ObjectiveConfig(**setting))
    x0, eps = draw(3, 2, 4, 4).float(), draw(3, 2, 4, 4, seed=1).float()
    t = objective.times(torch.tensor([0.2, 0.5, 0.8]))
    target = objective.target(x0, eps, t)
    offset = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
    seen = {}

    def denoiser(x, time, condition):
        seen.update(x=x, t=time, condition=condition)
        return (target + offset).bfloat16() if condition["low"] else target + offset

    losses = objective.losses(denoiser, x0, eps, t, {"low": False})
    torch.testing.assert_close(losses, torch.tensor([0.0, 1.0, 9.0]), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(seen["x"], objective.noise(x0, eps, t))
    assert torch.equal(seen["t"], t)
    assert objective.losses(denoiser, x0, eps, t, {"low": True}).dtype == torch.float32


def test_logit_normal_times_have_the_stated_quantiles() -> None:
    config = ObjectiveConfig(timesteps="logit_normal", logit_mean=0.5, logit_std=1.5)
    u = torch.tensor([0.0, 0.1, 0.5, 0.975, 1 - 2.0**-24])
    t = Objective(config).times(u)
    normal = Normal(0.5, 1.5).icdf(u[1:4].double())
    torch.testing.assert_close(t[1:4].double(), torch.sigmoid(normal), rtol=1e-5, atol=1e-7)
    assert (t > 0).all() and (t < 1).all() and (t.diff() > 0).all()


def test_uniform_times() -> None:
    u = torch.tensor([0.0, 0.4996, 0.9999])
    assert torch.equal(Objective(ObjectiveConfig()).times(u), u)
    table = Objective(ObjectiveConfig(prediction="eps", schedule="linear"))
    assert table.schedule.index(table.times(u)).tolist() == [0, 499, 999]
    eps = Objective(ObjectiveConfig(prediction="eps", schedule="cosine"))
    torch.testing.assert_close(eps.times(u), u * 0.999)


def test_learned_variance_is_trained_by_the_variational_bound() -> None:
    """The extra term is the divergence of two normals in bits, or the likelihood of a level."""
    config = ObjectiveConfig(prediction="eps", schedule="linear", variance="learned_range")
    objective = Objective(config)
    x0 = (draw(3, 2, 4, 4) * 0.3).clamp(-0.9, 0.9)
    eps, t = draw(3, 2, 4, 4, seed=1), torch.tensor([0.0, 0.3, 0.999], dtype=torch.float64)
    output = torch.cat((eps + 0.1 * draw(3, 2, 4, 4, seed=2), draw(3, 2, 4, 4, seed=3).tanh()), 1)
    losses = objective.losses(lambda *_: output, x0, eps, t, {})

    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    for b, i in enumerate((0, 300, 999)):
        before = bar[i - 1] if i else torch.ones((), dtype=torch.float64)
        x = bar[i].sqrt() * x0[b] + (1 - bar[i]).sqrt() * eps[b]
        guess = (x - (1 - bar[i]).sqrt() * output[b, :2]) / bar[i].sqrt()

        def mean(clean, i=i, before=before, x=x):
            first = before.sqrt() * beta[i] / (1 - bar[i]) * clean
            return first + (1 - beta[i]).sqrt() * (1 - before) / (1 - bar[i]) * x

        k = max(i, 1)
        tilde = beta[k] * (1 - bar[k - 1]) / (1 - bar[k])
        fraction = (output[b, 2:] + 1) / 2
        spread = torch.exp(0.5 * (fraction * beta[i].log() + (1 - fraction) * tilde.log()))
        if i:
            term = kl_divergence(Normal(mean(x0[b]), tilde.sqrt()), Normal(mean(guess), spread))
        else:
            model = Normal(mean(guess), spread)
            term = -(model.cdf(x0[b] + 1 / 255) - model.cdf(x0[b] - 1 / 255)).clamp(min=1e-12).log()
        expected = term.mean() / math.log(2) + (output[b, :2] - eps[b]).square().mean()
        # The published likelihood uses an approximate normal distribution function.
        torch.testing.assert_close(losses[b], expected, rtol=1e-9 if i else 2e-3, atol=1e-12)


LEARNED = {"prediction": "eps", "schedule": "linear", "variance": "learned_range"}


WEIGHTED = [
    {"prediction": "flow", "weighting": "min_snr"},
    {"prediction": "v", "schedule": "cosine_table", "weighting": "min_snr", "weighting_gamma": 2.0},
    LEARNED | {"weighting": "min_snr"},
]


@pytest.mark.parametrize(
    ("fields", "closed"),
    [
        ({"prediction": "eps", "schedule": "linear"}, lambda snr: min(snr, 5.0) / snr),
        ({"prediction": "v", "schedule": "linear"}, lambda snr: min(snr, 5.0) / (snr + 1)),
        ({"prediction": "flow"}, lambda snr: min(snr, 5.0) / (1 + snr**0.5) ** 2),
    ],
    ids=["eps", "v", "flow"],
)
def test_min_snr_is_the_capped_loss_of_the_clean_sample(fields: dict, closed) -> None:
    """Hang et al. 2023: min(SNR, gamma) |x_0 - x0_hat|^2, whatever is predicted."""
    objective = Objective(ObjectiveConfig(**fields, weighting="min_snr"))
    x0, eps = draw(4, 2, 3, 3), draw(4, 2, 3, 3, seed=1)
    t = torch.tensor([0.03, 0.2, 0.5, 0.9], dtype=torch.float64)
    output = objective.target(x0, eps, t) + 0.1 * draw(4, 2, 3, 3, seed=2)
    losses = objective.losses(lambda *_: output, x0, eps, t, {})
    snr = (objective.schedule.alpha(t) / objective.schedule.sigma(t)) ** 2
    assert snr.max() > 5.0 > snr.min()
    guess, _ = objective.clean(output, objective.noise(x0, eps, t), t)
    expected = snr.clamp(max=5.0) * (guess - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-8, atol=0)
    plain = (output - objective.target(x0, eps, t)).square().flatten(1).mean(1)
    for loss, error, ratio in zip(losses, plain, snr.tolist(), strict=True):
        assert float(loss / error) == pytest.approx(closed(ratio), rel=1e-9)


def test_min_snr_is_finite_at_both_ends_and_leaves_the_bound_alone() -> None:
    config = ObjectiveConfig(
        prediction="v", schedule="linear", zero_terminal_snr=True, weighting="min_snr"
    )
    ends = torch.tensor([0.0, 0.999])
    weight = Objective(config).weight(*Objective(config).schedule.coefficients(ends))
    assert weight[1] == 0.0 and 0 < weight[0] < 1e-3
    flow = Objective(ObjectiveConfig(weighting="min_snr"))
    assert flow.weight(*flow.schedule.coefficients(torch.tensor([0.0, 1.0]))).tolist() == [0, 0]

    x0, eps = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1)
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    output = torch.cat((eps, draw(2, 1, 2, 2, seed=3)), 1)  # no squared error, only the bound
    bounds = [
        Objective(ObjectiveConfig(**LEARNED, **fields)).losses(lambda *_: output, x0, eps, t, {})
        for fields in ({}, {"weighting": "min_snr"})
    ]
    assert torch.equal(*bounds) and bounds[0].min() > 0


@pytest.mark.parametrize("setting", [*SETTINGS, LEARNED, *WEIGHTED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_noise_by_position_gives_the_losses_of_noise_in_memory(setting: dict, dtype) -> None:
    """Values and gradients; float32 rounding, and one of the gradient in a 16-bit prediction."""
    objective = Objective(ObjectiveConfig(**setting))
    x0 = (draw(4, 2, 4, 6) * 0.3).float()
    positions = torch.tensor([3, 0, 1 << 40, 77])
    eps = rng.normal(5, 8, positions, (2, 4, 6))
    t = objective.times(torch.tensor([0.0, 0.3, 0.7, 0.99]))
    double = 2 if "variance" in setting else 1
    weight = (0.3 * draw(4, 2 * double, 4, 6, seed=2)).float()

    def losses(noise) -> tuple[torch.Tensor, torch.Tensor]:
        leaf, seen = weight.clone().requires_grad_(), []

        def denoiser(x, time, condition):
            seen.append(x.detach())
            return (torch.cat((x.detach(),) * double, 1) * 0.1 + leaf).to(dtype)

        values = objective.losses(denoiser, x0, noise, t, {})
        (values * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        return seen[0], values.detach(), leaf.grad

    stored, drawn = losses(eps), losses(Noise(positions, 5, 8))
    for a, b in zip(drawn[:2], stored[:2], strict=True):
        assert a.dtype == torch.float32
        # Where alpha is small a rounding of x is a large one of the clean estimate.
        torch.testing.assert_close(a, b, rtol=2e-4 if dtype == torch.bfloat16 else 2e-5, atol=2e-6)
    error = (drawn[2] - stored[2]).square().mean().sqrt() / stored[2].square().mean().sqrt()
    assert error < (8e-3 if dtype == torch.bfloat16 else 1e-4)


def test_noise_by_position_also_needs_the_variance_it_is_to_train() -> None:
    where = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="set model.learn_sigma to true"):
        Objective(ObjectiveConfig(**LEARNED)).losses(
            lambda x, *_: x, draw(2, 1, 2, 2), Noise(where, 1, 8), torch.tensor([0.1, 0.7]), {}
        )


def test_the_bound_trains_the_variance_alone() -> None:
    config = ObjectiveConfig(prediction="eps", schedule="linear", variance="learned_range")
    objective = Objective(config)
    x0, eps, t = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1), torch.tensor([0.1, 0.7])
    prediction = draw(2, 1, 2, 2, seed=2).requires_grad_()
    variance = draw(2, 1, 2, 2, seed=3).requires_grad_()
    output = torch.cat((prediction, variance), 1)
    objective.losses(lambda *_: output, x0, eps, t.double(), {}).sum().backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction.detach() - eps) / 4)
    assert variance.grad.abs().min() > 0


def test_a_second_half_is_used_by_a_learned_variance_alone() -> None:
    x0, eps, t = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1), torch.tensor([0.1, 0.7]).double()
    output = torch.cat((eps - x0, 7.0 * eps), 1)
    objective = Objective(ObjectiveConfig())
    losses = objective.losses(lambda *_: output, x0, eps, t, {})
    assert losses.tolist() == [0.0, 0.0]
    assert objective.split(output, x0)[1] is None
    fields = {"prediction": "eps", "schedule": "linear", "variance": "learned_range"}
    learned = Objective(ObjectiveConfig(**fields))
    assert torch.equal(learned.split(output, x0)[1], 7.0 * eps)
    with pytest.raises(UserError, match="set model.learn_sigma to true"):
        learned.losses(lambda *_: eps, x0, eps, t, {})


def test_learned_variance_lies_between_its_bounds() -> None:
    small, large = torch.tensor(0.01), torch.tensor(0.04)
    values = learned_log_variance(torch.tensor([-1.0, 0.0, 1.0]), small, large).exp()
    torch.testing.assert_close(values, torch.tensor([0.01, 0.02, 0.04]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "flow", "beta_start": 0.1}, "no effect on schedule 'flow'"),
        ({"schedule": "cosine", "zero_terminal_snr": True}, "zero_terminal_snr: no effect"),
        ({"schedule": "cosine_table", "beta_end": 0.1}, "no effect on schedule 'cosine_table'"),
        (
            {"prediction": "eps", "schedule": "linear", "zero_terminal_snr": True},
            "set prediction: v",
        ),
        ({"variance": "learned_range"}, "set schedule: linear"),
    ],
)
def test_settings_without_meaning_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig(**fields)


@pytest.mark.parametrize("name", ["train_steps", "logit_mean", "logit_std", "weighting_gamma"])
def test_a_field_without_effect_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} has no effect here"):
        ObjectiveConfig(**{name: 7})
