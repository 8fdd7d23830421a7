"""Steps on memory of their own, and on a GPU as CUDA graphs, draw what plain ones draw: exactly."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from etude.diffusion import captured as captured_steps
from etude.diffusion.captured import CapturedSteps
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample
from etude.models.dit import DiT, DiTConfig

EPS = {"prediction": "eps", "schedule": "linear"}
GUIDED = {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.8), "guidance_power": 2.0}
CASES = [
    ({}, {"method": "ddim"} | GUIDED),
    (EPS, {"method": "dpmpp_2m", "guidance_scale": 2.0, "guidance_channels": 1}),
    (EPS, {"method": "unipc", "guidance_scale": 2.0, "control_scale": 1.5}),
    ({}, {"method": "heun"} | GUIDED),
    (EPS, {"method": "ddim", "eta": 0.7}),
    (EPS | {"variance": "learned_range"}, {"method": "ddpm"} | GUIDED),
]
COUNT, STEPS = 4, 8


class Wave(nn.Module):
    """Nonlinear, with a weight, and with a variance where it is asked for one."""

    def __init__(self, variance: bool) -> None:
        super().__init__()
        self.variance = variance
        self.weight = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        label, size = (condition[k].to(x.dtype).view(-1, 1, 1, 1) for k in ("labels", "size"))
        made = torch.sin(2 * x + label) * size + self.weight * x.roll(1, -1) * t.view(-1, 1, 1, 1)
        return torch.cat((made, torch.tanh(made)), dim=1) if self.variance else made


def draw(
    model: nn.Module, objective: Objective, config: SamplerConfig, seed: int, device: str, **more
) -> Tensor:
    """A batch of noise and conditions of its own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(COUNT, 2, 4, 4, generator=generator).to(device)
    added = torch.randn(STEPS, COUNT, 2, 4, 4, generator=generator).to(device)
    labels = torch.randint(0, 5, (COUNT,), generator=generator).to(device)
    size = torch.rand(COUNT, generator=generator).to(device)
    condition = {"labels": labels, "size": size}
    none = condition | {"labels": torch.full_like(labels, 5)}
    nulls = [none, none | {"size": torch.zeros_like(size)}]
    return sample(
        model, objective, config, noise, condition, nulls=nulls,
        step_noise=lambda step: added[step], **more,
    )  # fmt: skip


def sampler(**fields) -> SamplerConfig:
    return SamplerConfig(**{"guidance_convention": "one_plus_lambda", "steps": STEPS} | fields)


def compare(device: str, objective: dict, fields: dict, captured: CapturedSteps, model: Wave):
    target, config = Objective(ObjectiveConfig(**objective)), sampler(**fields)
    results = []
    for seed in range(3):
        plain = draw(model, target, config, seed, device)
        held = draw(model, target, config, seed, device, captured=captured)
        assert torch.equal(held, plain), f"batch {seed}"
        results.append(plain)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(results, 2))


@pytest.mark.parametrize(("objective", "fields"), CASES, ids=str)
def test_batches_after_the_first_are_drawn_on_the_same_memory(objective, fields) -> None:
    model = Wave("variance" in objective)
    captured = CapturedSteps(model)
    compare("cpu", objective, fields, captured, model)
    compare("cpu", objective, fields | {"steps": 3}, captured, model)  # another sampler


def test_what_the_steps_are_given_is_not_changed() -> None:
    """The noise stays as it is, and what `progress` saw is not overwritten by later steps."""
    model, noise = Wave(False), torch.randn(COUNT, 2, 4, 4)
    before, seen = noise.clone(), []
    condition = {"labels": torch.zeros(COUNT), "size": torch.ones(COUNT)}
    for _ in range(2):
        sample(
            model, Objective(ObjectiveConfig()), sampler(), noise, condition,
            progress=lambda done, x, x0: seen.append((x, x0)), captured=CapturedSteps(model),
        )  # fmt: skip
    assert torch.equal(noise, before)
    for first, second in zip(seen[:STEPS], seen[STEPS:], strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_steps_under_another_arithmetic_are_others(monkeypatch) -> None:
    model, made = Wave(False), []
    slot = captured_steps._Slot
    monkeypatch.setattr(captured_steps, "_Slot", lambda *given: made.append(0) or slot(*given))
    captured, target, config = CapturedSteps(model), Objective(ObjectiveConfig()), sampler()

    def new() -> bool:
        made.clear()
        draw(model, target, config, 0, "cpu", captured=captured)
        return bool(made)

    assert new() and not new()
    with torch.autocast("cpu", torch.bfloat16):
        assert new()
        with torch.autocast("cpu", torch.float16):
            assert new()
    precision = torch.get_float32_matmul_precision()
    try:
        assert new()
        torch.set_float32_matmul_precision("high" if precision == "highest" else "highest")
        assert new()
        torch.use_deterministic_algorithms(True)
        assert new() and not new()
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize(("objective", "fields"), CASES, ids=str)
def test_replayed_steps_are_those_that_ran(objective, fields) -> None:
    model = Wave("variance" in objective).cuda()
    captured = CapturedSteps(model, capture=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare("cuda", objective, fields, captured, model)
        replayed = captured.replayed
        assert replayed > 0
        # Weights changed in place are followed; weights elsewhere are noticed.
        model.weight.fill_(-0.4)
        compare("cuda", objective, fields, captured, model)
        kept, model.weight = model.weight, nn.Parameter(torch.tensor(1.3).cuda())
        compare("cuda", objective, fields, captured, model)
    assert kept.item() == pytest.approx(-0.4) and captured.replayed > 2 * replayed


@pytest.mark.gpu
def test_every_evaluation_is_counted_once() -> None:
    model, called = Wave(False).cuda(), 0

    def counting(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        nonlocal called
        called += len(x)
        return model(x, t, condition)

    captured = CapturedSteps(model, capture=True)
    target, config = Objective(ObjectiveConfig()), sampler(method="heun", guidance_scale=2.0)
    for seed in range(3):
        draw(counting, target, config, seed, "cuda", captured=captured)
    assert called + captured.replayed == 3 * (2 * STEPS - 1) * 2 * COUNT


@pytest.mark.gpu
def test_a_network_that_cannot_be_captured_runs_as_it_is() -> None:
    class Looking(Wave):
        def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            return super().forward(x, t, condition) * (1.0 + float(t[0]))

    model = Looking(False).cuda()
    captured = CapturedSteps(model, capture=True)
    with pytest.warns(UserWarning, match="sampling steps run without CUDA graphs: ") as told:
        compare("cuda", {}, {}, captured, model)
    assert len(told) == 1 and captured.replayed == 0


@pytest.mark.gpu
def test_a_transformer_on_our_kernels_is_replayed_exactly() -> None:
    config = DiTConfig(input_size=4, in_channels=2, hidden_size=64, depth=2, num_heads=2,
                       num_classes=5)  # fmt: skip
    model = DiT(config).cuda().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    captured = CapturedSteps(model, capture=True)

    def denoiser(x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return model(x, t * 1000.0, condition)

    target = Objective(ObjectiveConfig(**EPS, variance="learned_range"))
    for seed in range(3):
        given = target, sampler(method="ddpm", guidance_scale=2.0), seed, "cuda"
        plain = draw(denoiser, *given)
        assert torch.equal(draw(denoiser, *given, captured=captured), plain)
    assert captured.replayed > 0
