"""Entropy guidance: its sign, its scale, its gradient, and that it leaves everything else alone."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.diffusion.guidance import EntropyGuidance, GuidanceConfig, entropy
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample
from etude.models.classifier import Classifier, ClassifierConfig
from etude.models.dit import DiT, DiTConfig

CENTRE = torch.tensor([1.0, 0.0], dtype=torch.float64)
EPS = Objective(ObjectiveConfig(prediction="eps", schedule="linear"))
FLOW = Objective(ObjectiveConfig())


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(count: int = 50, **fields) -> SamplerConfig:
    return SamplerConfig(steps=count, guidance_convention="lambda", **fields)


def gaussian_classes(objective: Objective):
    """The exact denoiser of two unit Gaussians in the plane, one per label, at +-CENTRE."""

    def denoiser(x, t, condition):
        alpha = objective.schedule.alpha(t).view(-1, 1, 1, 1)
        sigma = objective.schedule.sigma(t).view(-1, 1, 1, 1)
        sign = 2.0 * condition["labels"].to(x.dtype).view(-1, 1, 1, 1) - 1.0
        mean = sign * CENTRE.view(1, 2, 1, 1)
        total = alpha**2 + sigma**2
        clean = mean + alpha / total * (x - alpha * mean)
        return objective.target(clean, sigma / total * (x - alpha * mean), t)

    return denoiser


def bayes(x: torch.Tensor) -> torch.Tensor:
    """Logits of the two classes given a clean point (B, 2, 1, 1)."""
    score = 2.0 * x.flatten(1) @ CENTRE
    return torch.stack((torch.zeros_like(score), score), dim=1)


class PrintedSign(EntropyGuidance):
    """Equation 7 as printed in the paper: eps + omega * gradient."""

    def push(self, denoiser, objective, x, prediction, t, condition, *, corrector=False):
        gradient = self.gradient(denoiser, objective, x, prediction, t, condition)
        eps = prediction + self.config.omega * gradient
        return x, *objective.clean(eps, x, t)


def final_entropy(objective: Objective, guide: type | None, **fields) -> float:
    z, labels = draw(400, 2, 1, 1), torch.arange(400) % 2
    maker = guide(GuidanceConfig(every=1, **fields), bayes, lambda x: x) if guide else None
    condition = {"labels": labels}
    x = sample(gaussian_classes(objective), objective, steps(), z, condition, guide=maker)
    return float(entropy(bayes(x)).mean())


@pytest.mark.parametrize("objective", [EPS, FLOW], ids=["eps", "flow"])
def test_guidance_raises_the_entropy_in_both_modes(objective: Objective) -> None:
    plain = final_entropy(objective, None)
    for mode, omegas in (("score", (0.5, 2.0, 4.0)), ("norm_matched", (0.01, 0.03))):
        values = [plain]
        values += [final_entropy(objective, EntropyGuidance, mode=mode, omega=w) for w in omegas]
        assert (np.diff(values) > 0.01).all(), values


def test_the_printed_sign_lowers_the_entropy() -> None:
    plain = final_entropy(EPS, None)
    values = [final_entropy(EPS, PrintedSign, mode="score", omega=w) for w in (0.5, 2.0)]
    assert plain > values[0] + 0.01 > values[1] + 0.02


def test_the_score_form_is_the_guided_score() -> None:
    """eps = -sigma * score, and a flow velocity is eps - x_0 at the same x."""
    denoiser, condition = gaussian_classes(FLOW), {"labels": torch.tensor([0, 1, 1])}
    x, t = draw(3, 2, 1, 1), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    prediction = denoiser(x, t, condition)
    guide = EntropyGuidance(GuidanceConfig(mode="score", omega=0.7), bayes, lambda x: x)
    guide.start(3, x.device)
    moved, x0, eps = guide.push(denoiser, FLOW, x, prediction, t, condition)
    gradient = guide.gradient(denoiser, FLOW, x, prediction, t, condition)
    assert torch.equal(moved, x)
    alpha, sigma = (1 - t).view(3, 1, 1, 1), t.view(3, 1, 1, 1)
    score = -FLOW.clean(prediction, x, t)[1] / sigma
    torch.testing.assert_close(-eps / sigma, score + 0.7 * gradient)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)
    velocity = prediction - 0.7 * (sigma + sigma**2 / alpha) * gradient
    torch.testing.assert_close(eps - x0, velocity)


def test_pure_noise_without_signal_gets_no_score_guidance() -> None:
    denoiser, condition = gaussian_classes(FLOW), {"labels": torch.tensor([0, 1])}
    x, t = draw(2, 2, 1, 1), torch.ones(2, dtype=torch.float64)
    prediction = denoiser(x, t, condition)
    guide = EntropyGuidance(GuidanceConfig(mode="score", omega=0.7), bayes, lambda x: x)
    guide.start(2, x.device)
    _, x0, eps = guide.push(denoiser, FLOW, x, prediction, t, condition)
    torch.testing.assert_close((x0, eps), FLOW.clean(prediction, x, t))


def network(seed: int, inputs: int, outputs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs)
        return nn.Sequential(nn.Flatten(), *layers).double()


class Toy:
    """A small network denoiser over (B, 1, 2, 3), with a label; counts its calls."""

    def __init__(self) -> None:
        self.network, self.calls = network(1, 8, 6), 0

    def __call__(self, x, t, condition):
        self.calls += 1
        extra = torch.stack((t, condition["labels"].to(x.dtype)), dim=1)
        return self.network(torch.cat((x.flatten(1), extra), dim=1)).view_as(x)


@pytest.mark.parametrize("path", ["full", "stop_denoiser"])
@pytest.mark.parametrize("criterion", ["entropy", "loss"])
@pytest.mark.parametrize("blend", [False, True])
def test_gradient_against_finite_differences(path: str, criterion: str, blend: bool) -> None:
    objective, toy, learner = FLOW, Toy(), network(2, 6, 4)
    decoder = network(3, 6, 6)
    x, t = draw(3, 1, 2, 3), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    condition = {"labels": torch.tensor([0, 3, 1])}
    held = toy(x, t, condition).detach()

    def criterion_of(x: torch.Tensor) -> torch.Tensor:
        output = toy(x, t, condition) if path == "full" else held
        time = t.view(-1, 1, 1, 1)
        clean = x - time * output
        clean = time * clean + (1 - time) * x if blend else clean
        probability = torch.softmax(learner(decoder(clean)), dim=1)
        if criterion == "entropy":
            return -(probability * probability.log()).sum(1)
        return -probability[torch.arange(3), condition["labels"]].log()

    config = GuidanceConfig(path=path, criterion=criterion, blend=blend)
    guide = EntropyGuidance(config, learner, decoder)
    guide.start(3, x.device)
    gradient = guide.gradient(toy, objective, x, held, t, condition)
    step, expected = 1e-6, torch.zeros_like(x)
    with torch.no_grad():
        for i in range(2):
            for j in range(3):
                shift = torch.zeros_like(x)
                shift[:, 0, i, j] = step
                difference = criterion_of(x + shift) - criterion_of(x - shift)
                expected[:, 0, i, j] = difference / (2 * step)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert gradient.abs().max() > 1e-3


def test_step_length_is_a_share_of_each_sample() -> None:
    toy, scale = Toy(), torch.tensor([1e-3, 1.0, 40.0], dtype=torch.float64).view(3, 1, 1, 1)
    x, t = draw(3, 1, 2, 3) * scale, torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    condition = {"labels": torch.tensor([0, 3, 1])}
    prediction = toy(x, t, condition).detach()
    guide = EntropyGuidance(GuidanceConfig(omega=0.05), network(2, 6, 4), lambda x: x)
    guide.start(3, x.device)
    moved, x0, _ = guide.push(toy, FLOW, x, prediction, t, condition)
    gradient = guide.gradient(toy, FLOW, x, prediction, t, condition)
    shift = (moved - x).flatten(1)
    torch.testing.assert_close(shift.norm(dim=1), 0.05 * x.flatten(1).norm(dim=1))
    aligned = torch.cosine_similarity(shift, gradient.flatten(1))
    torch.testing.assert_close(aligned, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(x0, moved - t.view(3, 1, 1, 1) * prediction)


@pytest.mark.parametrize("mode", ["score", "norm_matched"])
@pytest.mark.parametrize("method", ["ddim", "heun", "ddpm"])
def test_zero_omega_is_plain_sampling_bit_for_bit(mode: str, method: str) -> None:
    z, condition = draw(4, 1, 2, 3).float(), {"labels": torch.arange(4)}
    toy, learner = Toy(), network(2, 6, 4).float()
    toy.network.float()

    def run(omega: float | None) -> torch.Tensor:
        config = GuidanceConfig(omega=omega, mode=mode, every=1) if omega is not None else None
        guide = EntropyGuidance(config, learner, lambda x: x) if config else None
        return sample(
            toy, FLOW, steps(8, method=method), z, condition,
            guide=guide, step_noise=lambda step: draw(4, 1, 2, 3, seed=step),
        )  # fmt: skip

    plain = run(None)
    assert torch.equal(run(0.0), plain)
    torch.testing.assert_close(run(1e-12), plain, rtol=0, atol=1e-6)
    assert (run(0.2) - plain).abs().max() > 1e-3


def test_frequency_interval_and_cost() -> None:
    z, condition = draw(2, 1, 2, 3), {"labels": torch.arange(2)}
    learner_calls = []

    def learner(x: torch.Tensor) -> torch.Tensor:
        learner_calls.append(torch.is_grad_enabled())
        return x.flatten(1)

    def guided_steps(path: str, **fields) -> tuple[int, int]:
        toy, before = Toy(), len(learner_calls)
        guide = EntropyGuidance(GuidanceConfig(path=path, **fields), learner, lambda x: x)
        sample(toy, FLOW, steps(10), z, condition, guide=guide)
        return sum(learner_calls[before:]), toy.calls

    assert guided_steps("full", every=5) == (2, 12)
    assert guided_steps("stop_denoiser", every=5) == (2, 10)
    assert guided_steps("full", every=1, interval=(0.35, 0.75)) == (4, 14)  # times .7 .6 .5 .4


def test_a_heun_step_moves_x_once_and_corrects_the_score_twice() -> None:
    z, condition, calls = draw(2, 1, 2, 3), {"labels": torch.arange(2)}, []

    def learner(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return x.flatten(1)

    counts = []
    for mode in ("norm_matched", "score"):
        guide = EntropyGuidance(GuidanceConfig(mode=mode, every=2), learner, lambda x: x)
        sample(Toy(), FLOW, steps(4, method="heun"), z, condition, guide=guide)
        counts.append(sum(calls))
        calls.clear()
    assert counts == [2, 4]  # steps 0 and 2; neither is the last, which has no corrector


def test_gradient_through_the_real_networks() -> None:
    """Float32 and the operators in use, against float64 and the references."""
    shape = dict(input_size=4, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    model = DiT(DiTConfig(**shape, learn_sigma=True))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    learner = Classifier(ClassifierConfig(in_channels=2, channels=(8, 16), groups=4, num_classes=3))
    t, labels, x = torch.tensor([0.8, 0.5, 0.2]), torch.tensor([0, 2, 3]), draw(3, 2, 4, 4)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        model.to(dtype), learner.to(dtype)
        guide = EntropyGuidance(
            GuidanceConfig(), learner, lambda x0: F.interpolate(x0, scale_factor=2.0)
        )
        return guide.gradient(
            lambda x, t, condition: model(x, t * 1000, condition),
            FLOW, x.to(dtype), x.to(dtype), t.to(dtype), {"labels": labels},
        )  # fmt: skip

    single, double = gradient(torch.float32), gradient(torch.float64)
    error = (single - double).flatten(1).norm(dim=1) / double.flatten(1).norm(dim=1)
    assert (error < 1e-3).all()
    assert all(p.grad is None for p in (*model.parameters(), *learner.parameters()))


def test_full_batch_equals_one_by_one() -> None:
    z, labels, learner = draw(6, 1, 2, 3), torch.arange(6) % 4, network(2, 6, 4)

    def run(rows: list[int], **fields) -> torch.Tensor:
        guide = EntropyGuidance(GuidanceConfig(omega=0.1, every=2, **fields), learner, lambda x: x)
        options = steps(6, guidance_scale=1.5)
        null = {"labels": torch.full((len(rows),), 9)}
        condition = {"labels": labels[rows]}
        return sample(Toy(), FLOW, options, z[rows], condition, nulls=[null], guide=guide)

    for fields in ({}, {"mode": "score"}, {"path": "stop_denoiser"}):
        together = run([0, 1, 2, 3, 4, 5], **fields)
        torch.testing.assert_close(run([4], **fields), together[[4]], rtol=1e-10, atol=1e-12)


class Fragile(nn.Module):
    """A learner with a normalisation that has state, and a pole for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6).double()
        self.head = nn.Linear(6, 4).double()
        self.head.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        assert not torch.is_grad_enabled() or not self.training
        return self.head(self.norm(x)) / (x[:, :1].abs() < 50.0)


def test_a_gradient_that_is_not_finite_leaves_that_sample_alone() -> None:
    x, t = draw(3, 1, 2, 3), torch.full((3,), 0.5, dtype=torch.float64)
    x[1] = 1e4
    condition, toy = {"labels": torch.arange(3)}, Toy()
    prediction = toy(x, t, condition).detach()
    guide = EntropyGuidance(GuidanceConfig(omega=0.1), Fragile(), lambda x: x)
    guide.start(3, x.device)
    moved, _, _ = guide.push(toy, FLOW, x, prediction, t, condition)
    shift = (moved - x).flatten(1).norm(dim=1)
    assert shift[1] == 0.0 and (shift[[0, 2]] > 0).all()
    guide.push(toy, FLOW, x, prediction, t, condition)
    assert guide.telemetry()["nonfinite"].tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_learner_is_handed_back_as_it_was(fails: bool) -> None:
    learner = Fragile()
    learner.norm.eval()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    modes = [module.training for module in learner.modules()]
    wanted = [parameter.requires_grad for parameter in learner.parameters()]

    def decode(x: torch.Tensor) -> torch.Tensor:
        if fails:
            raise RuntimeError("decoder failed")
        return x

    guide = EntropyGuidance(GuidanceConfig(every=1), learner, decode)
    try:
        sample(Toy(), FLOW, steps(3), draw(2, 1, 2, 3), {"labels": torch.arange(2)}, guide=guide)
    except RuntimeError:
        assert fails
    assert [module.training for module in learner.modules()] == modes
    assert [parameter.requires_grad for parameter in learner.parameters()] == wanted
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_telemetry_measures_the_finished_samples() -> None:
    z, labels = draw(5, 2, 1, 1), torch.tensor([0, 1, 0, 1, 0])
    guide = EntropyGuidance(GuidanceConfig(), bayes, lambda x: x)
    x = sample(gaussian_classes(EPS), EPS, steps(20), z, {"labels": labels}, guide=guide)
    report = guide.telemetry()
    p = 1 / (1 + np.exp(-2 * x[:, 0, 0, 0].numpy()))
    np.testing.assert_allclose(
        report["entropy"], -p * np.log(p) - (1 - p) * np.log1p(-p), rtol=1e-4
    )
    assert report["agreement"].tolist() == ((p > 0.5) == labels.numpy()).astype(float).tolist()
    assert report["nonfinite"].tolist() == [0.0] * 5


def test_ceiling_leaves_uncertain_samples_alone() -> None:
    x = torch.tensor([[0.05, 0.0], [2.0, 0.0]], dtype=torch.float64).view(2, 2, 1, 1)
    t, condition = torch.full((2,), 0.3, dtype=torch.float64), {"labels": torch.tensor([1, 1])}
    logits_are_x = {"learner": bayes, "decode": lambda x: x}
    guide = EntropyGuidance(GuidanceConfig(ceiling=0.9, path="stop_denoiser"), **logits_are_x)
    guide.start(2, x.device)
    gradient = guide.gradient(gaussian_classes(FLOW), FLOW, x, torch.zeros_like(x), t, condition)
    assert not gradient[0].any() and gradient[1].any()
    assert float(entropy(bayes(x))[0]) > 0.9 * math.log(2)
