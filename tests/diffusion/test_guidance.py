"""Entropy guidance: its sign, its scale, its gradient, and that it leaves everything else alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.diffusion.criteria import entropy
from etude.diffusion.guidance import EntropyGuidance, GuidanceConfig, Pushed
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample

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


def evaluated(guide: EntropyGuidance, denoiser, x, t, condition) -> tuple:
    """x and the network's output there as a sampler gives them to the guide."""
    if not guide.traces:
        return x, denoiser(x, t, condition).detach()
    x = x.detach().requires_grad_()
    return x, denoiser(x, t, condition)


def push(guide: EntropyGuidance, denoiser, objective, x, t, condition) -> tuple:
    """(x, x0_hat, eps_hat) of an evaluation without classifier-free guidance."""
    leaf, output = evaluated(guide, denoiser, x, t, condition)
    pushed = guide.push(objective, leaf, output, t, condition)
    x0, eps = objective.clean(output.detach(), pushed.x, t)
    if pushed.by_x0 is not None:
        x0, eps = x0 + pushed.by_x0, eps + pushed.by_eps
    return pushed.x, x0, eps


def gradient(guide: EntropyGuidance, denoiser, objective, x, t, condition) -> torch.Tensor:
    x, output = evaluated(guide, denoiser, x, t, condition)
    return guide.gradient(objective, x, output, t, condition)


class PrintedSign(EntropyGuidance):
    """Equation 7 as printed in the paper: eps + omega * gradient."""

    def push(self, objective, x, output, t, condition):
        by_eps = self.config.omega * self.gradient(objective, x, output, t, condition)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in objective.schedule.coefficients(t))
        return Pushed(x.detach(), -sigma / alpha * by_eps, by_eps)


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
    moved, x0, eps = push(guide, denoiser, FLOW, x, t, condition)
    found = gradient(guide, denoiser, FLOW, x, t, condition)
    assert torch.equal(moved, x)
    alpha, sigma = (1 - t).view(3, 1, 1, 1), t.view(3, 1, 1, 1)
    score = -FLOW.clean(prediction, x, t)[1] / sigma
    torch.testing.assert_close(-eps / sigma, score + 0.7 * found)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)
    velocity = prediction - 0.7 * (sigma + sigma**2 / alpha) * found
    torch.testing.assert_close(eps - x0, velocity)


def test_pure_noise_without_signal_gets_no_score_guidance() -> None:
    denoiser, condition = gaussian_classes(FLOW), {"labels": torch.tensor([0, 1])}
    x, t = draw(2, 2, 1, 1), torch.ones(2, dtype=torch.float64)
    prediction = denoiser(x, t, condition)
    guide = EntropyGuidance(GuidanceConfig(mode="score", omega=0.7), bayes, lambda x: x)
    _, x0, eps = push(guide, denoiser, FLOW, x, t, condition)
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


def written_out(criterion: str, probability: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The criteria in the terms of their definitions, by sorting and indexing."""
    entropy = -(probability * probability.log()).sum(1)
    loss = -probability[torch.arange(len(labels)), labels].log()
    ordered = probability.sort(1).values
    return {
        "entropy": entropy,
        "loss": loss,
        "margin": 1 - ordered[:, -1] + ordered[:, -2],
        "entropy_label": entropy - 0.3 * loss,
    }[criterion]


@pytest.mark.parametrize("path", ["full", "stop_denoiser"])
@pytest.mark.parametrize("criterion", ["entropy", "loss", "margin", "entropy_label"])
@pytest.mark.parametrize("blend", [False, True])
def test_gradient_against_finite_differences(path: str, criterion: str, blend: bool) -> None:
    toy, learner, decoder = Toy(), network(2, 6, 4), network(3, 6, 6)
    x, t = draw(3, 1, 2, 3), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    condition = {"labels": torch.tensor([0, 3, 1])}
    held = toy(x, t, condition).detach()

    def criterion_of(x: torch.Tensor) -> torch.Tensor:
        output = toy(x, t, condition) if path == "full" else held
        time = t.view(-1, 1, 1, 1)
        clean = x - time * output
        clean = time * clean + (1 - time) * x if blend else clean
        probability = torch.softmax(learner(decoder(clean)), dim=1)
        return written_out(criterion, probability, condition["labels"])

    weight = {"label_weight": 0.3} if criterion == "entropy_label" else {}
    config = GuidanceConfig(path=path, criterion=criterion, blend=blend, **weight)
    found = gradient(EntropyGuidance(config, learner, decoder), toy, FLOW, x, t, condition)
    step, expected = 1e-6, torch.zeros_like(x)
    with torch.no_grad():
        for i in range(2):
            for j in range(3):
                shift = torch.zeros_like(x)
                shift[:, 0, i, j] = step
                difference = criterion_of(x + shift) - criterion_of(x - shift)
                expected[:, 0, i, j] = difference / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("prediction", ["eps", "flow", "v"])
def test_stop_denoiser_is_the_estimates_own_slope(prediction: str) -> None:
    """d x0_hat / dx with the output held: 1 / alpha, 1 / (alpha + sigma), alpha / (alpha^2 +
    sigma^2)."""
    objective = Objective(ObjectiveConfig(prediction=prediction, schedule="linear"))
    toy, learner = Toy(), network(2, 6, 4)
    x, t = draw(3, 1, 2, 3), torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    condition = {"labels": torch.tensor([0, 3, 1])}
    guide = EntropyGuidance(GuidanceConfig(path="stop_denoiser"), learner, lambda x: x)
    found = gradient(guide, toy, objective, x, t, condition)
    clean = objective.clean(toy(x, t, condition).detach(), x, t)[0].requires_grad_()
    p = learner(clean).softmax(1)
    (by_clean,) = torch.autograd.grad(-(p * p.log()).sum(), clean)
    alpha, sigma = (c.view(3, 1, 1, 1) for c in objective.schedule.coefficients(t))
    slope = {"eps": 1 / alpha, "flow": 1 / (alpha + sigma), "v": alpha / (alpha**2 + sigma**2)}
    torch.testing.assert_close(found, slope[prediction] * by_clean)
    assert guide.passes == 0


def test_step_length_is_a_share_of_each_sample() -> None:
    toy, scale = Toy(), torch.tensor([1e-3, 1.0, 40.0], dtype=torch.float64).view(3, 1, 1, 1)
    x, t = draw(3, 1, 2, 3) * scale, torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    condition = {"labels": torch.tensor([0, 3, 1])}
    prediction = toy(x, t, condition).detach()
    guide = EntropyGuidance(GuidanceConfig(omega=0.05), network(2, 6, 4), lambda x: x)
    moved, x0, _ = push(guide, toy, FLOW, x, t, condition)
    found = gradient(guide, toy, FLOW, x, t, condition)
    shift = (moved - x).flatten(1)
    torch.testing.assert_close(shift.norm(dim=1), 0.05 * x.flatten(1).norm(dim=1))
    aligned = torch.cosine_similarity(shift, found.flatten(1))
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

    assert guided_steps("full", every=5) == (2, 10)
    assert guided_steps("stop_denoiser", every=5) == (2, 10)
    assert guided_steps("full", every=1, interval=(0.35, 0.75)) == (4, 10)  # times .7 .6 .5 .4


@pytest.mark.parametrize("path", ["full", "stop_denoiser"])
def test_no_row_is_evaluated_twice_and_only_the_conditional_one_has_a_gradient(path: str) -> None:
    """The published frequency under classifier-free guidance: 30 steps, of which six are guided."""
    z, condition = draw(4, 1, 2, 3), {"labels": torch.arange(4)}
    null, toy, rows, traced = {"labels": torch.full((4,), 9)}, Toy(), [], []

    def denoiser(x, t, condition):
        rows.append(len(x))
        if torch.is_grad_enabled():
            traced.append(condition["labels"].tolist())
        return toy(x, t, condition)

    guide = EntropyGuidance(GuidanceConfig(path=path), network(2, 6, 4), lambda x: x)
    options = steps(30, guidance_scale=1.5)
    sample(denoiser, FLOW, options, z, condition, nulls=[null], guide=guide)
    assert sum(rows) == 30 * 2 * 4
    assert traced == ([[0, 1, 2, 3]] * 6 if path == "full" else [])
    assert guide.passes == len(traced)


@pytest.mark.parametrize("scale", [None, 1.5])
def test_the_steps_own_prediction_is_the_conditional_estimate(scale: float | None) -> None:
    """One guided step against a formula with an evaluation of its own for the gradient."""
    toy, learner, omega = Toy(), network(2, 6, 4), 0.2
    z, labels = draw(3, 1, 2, 3), torch.tensor([0, 3, 1])
    null = {"labels": torch.full((3,), 9)}
    options = steps(4, guidance_scale=scale)
    guide = EntropyGuidance(GuidanceConfig(omega=omega, every=9), learner, lambda x: x)
    seen = []
    sample(
        toy, FLOW, options, z, {"labels": labels}, nulls=[null] if scale else (), guide=guide,
        progress=lambda done, x, x0: seen.append(x),
    )  # fmt: skip
    one = torch.ones(3, dtype=torch.float64)
    x = z.clone().requires_grad_()
    asked = toy(x, one, {"labels": labels})
    p = learner(x - asked).softmax(1)
    (found,) = torch.autograd.grad(-(p * p.log()).sum(), x)
    lengths = [a.flatten(1).norm(dim=1).view(3, 1, 1, 1) for a in (z, found)]
    moved = z + omega * found * lengths[0] / lengths[1]
    velocity = asked.detach()
    if scale:
        velocity = velocity + scale * (velocity - toy(z, one, null).detach())
    torch.testing.assert_close(seen[0], moved - 0.25 * velocity)


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


def test_full_batch_equals_one_by_one() -> None:
    z, labels, learner = draw(6, 1, 2, 3), torch.arange(6) % 4, network(2, 6, 4)

    def run(rows: list[int], **fields) -> torch.Tensor:
        guide = EntropyGuidance(GuidanceConfig(omega=0.1, every=2, **fields), learner, lambda x: x)
        options = steps(6, guidance_scale=1.5)
        null = {"labels": torch.full((len(rows),), 9)}
        condition = {"labels": labels[rows]}
        return sample(Toy(), FLOW, options, z[rows], condition, nulls=[null], guide=guide)

    kept = {"ceiling": 0.9, "keep_label": True}
    for fields in ({}, {"mode": "score"}, {"path": "stop_denoiser"}, kept, {"decode_rows": 4}):
        together = run([0, 1, 2, 3, 4, 5], **fields)
        torch.testing.assert_close(run([1, 3], **fields), together[[1, 3]], rtol=1e-10, atol=1e-12)
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


@pytest.mark.parametrize("path", ["full", "stop_denoiser"])
def test_a_gradient_that_is_not_finite_leaves_that_sample_alone(path: str) -> None:
    x, t = draw(3, 1, 2, 3), torch.full((3,), 0.5, dtype=torch.float64)
    x[1] = 1e4
    condition, toy = {"labels": torch.arange(3)}, Toy()
    guide = EntropyGuidance(GuidanceConfig(omega=0.1, path=path), Fragile(), lambda x: x)
    guide.start(3, x.device, condition)
    moved, _, _ = push(guide, toy, FLOW, x, t, condition)
    shift = (moved - x).flatten(1).norm(dim=1)
    assert shift[1] == 0.0 and (shift[[0, 2]] > 0).all()
    push(guide, toy, FLOW, x, t, condition)
    assert guide.telemetry()["nonfinite"].tolist() == [0.0, 2.0, 0.0]
    assert guide.telemetry()["held"].tolist() == [0.0, 0.0, 0.0]


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


def test_the_cheap_decoder_pushes_and_the_real_one_judges() -> None:
    z, condition = draw(3, 2, 1, 1), {"labels": torch.tensor([0, 1, 0])}
    calls = {"real": [], "cheap": []}

    def decoder(name: str, factor: float):
        def decode(x: torch.Tensor) -> torch.Tensor:
            calls[name].append(torch.is_grad_enabled())
            return factor * x

        return decode

    def run(cheap) -> tuple[torch.Tensor, EntropyGuidance]:
        config = GuidanceConfig(mode="score", omega=1.0, decoder="taesd" if cheap else "")
        guide = EntropyGuidance(config, bayes, decoder("real", 1.0), cheap_decode=cheap)
        toy = gaussian_classes(FLOW)
        return sample(toy, FLOW, steps(10), z, condition, guide=guide), guide

    x, guide = run(decoder("cheap", 3.0))
    assert calls == {"real": [False], "cheap": [True] * 2}
    torch.testing.assert_close(guide.pictures, x)
    expected = entropy(bayes(x)).float().numpy()
    np.testing.assert_allclose(guide.telemetry()["entropy"], expected, rtol=1e-6)
    assert (run(None)[0] - x).abs().max() > 1e-3
    for named, given in (("taesd", None), ("", decoder("cheap", 3.0))):
        with pytest.raises(ValueError, match="hand over both, or neither"):
            EntropyGuidance(GuidanceConfig(decoder=named), bayes, torch.tanh, cheap_decode=given)


def test_bf16_decoding_is_close_to_fp32() -> None:
    """Autocast reaches the decoder and the learner, which resizes, and nothing else."""
    toy, x, t = Toy(), draw(8, 1, 2, 3).float(), torch.linspace(0.1, 0.9, 8)
    toy.network.float()
    classifier, decoder = network(2, 6, 4).float(), nn.Conv2d(1, 1, 3, padding=1)
    condition, dtypes = {"labels": torch.arange(8) % 4}, []

    def decode(x: torch.Tensor) -> torch.Tensor:
        made = decoder(x)
        dtypes.append((x.dtype, made.dtype))
        return made

    def learner(pictures: torch.Tensor) -> torch.Tensor:
        large = F.interpolate(pictures, (4, 6), mode="bilinear", antialias=True)
        logits = classifier(F.avg_pool2d(large, 2))
        dtypes.append((pictures.dtype, logits.dtype))
        return logits

    def denoiser(x, t, condition):
        made = toy(x, t, condition)
        assert made.dtype == torch.float32
        return made

    found = {}
    for precision in ("fp32", "bf16"):
        guide = EntropyGuidance(GuidanceConfig(decode_precision=precision), learner, decode)
        found[precision] = gradient(guide, denoiser, FLOW, x, t, condition)
    assert dtypes == [(torch.float32, torch.float32)] * 2 + [(torch.float32, torch.bfloat16)] * 2
    assert found["bf16"].dtype == torch.float32
    apart = (found["bf16"] - found["fp32"]).flatten(1).norm(dim=1)
    share = apart / found["fp32"].flatten(1).norm(dim=1)
    assert 1e-4 < share.max() < 0.05, share
