"""Samplers and tables against diffusers' schedulers, step by step."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from torch import Tensor

from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample
from etude.kernels import solver

diffusers = pytest.importorskip("diffusers")

TABLES = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    },
    "cosine_table": {"beta_schedule": "squaredcos_cap_v2"},
}  # fmt: skip
NAMES = {"eps": "epsilon", "v": "v_prediction"}


def noise(seed: int = 0) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Tensor, *, double: bool = False) -> Tensor:
    """A stand-in denoiser: nonlinear, time-dependent, of bounded slope. t in [0, 1]."""
    time = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
    y = 0.9 * x + 0.1 * torch.sin(3 * x.roll(1, -1) + 2 * time)
    return torch.cat((y, torch.tanh(x * 2)), dim=1) if double else y


def ours(fields: dict, start: Tensor, *, double: bool = False, **options) -> list[Tensor]:
    """The sample after every step."""
    arguments = {name: options.pop(name) for name in ("step_noise", "times") if name in options}
    steps: list[Tensor] = []
    sample(
        lambda x, t, condition: network(x, t, double=double),
        Objective(ObjectiveConfig(**fields)),
        SamplerConfig(guidance_convention="lambda", **options),
        start,
        {},
        progress=lambda done, x, x0: steps.append(x),
        **arguments,
    )
    return steps


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert float((a - b).norm() / b.norm()) < 1e-5, step


@pytest.mark.parametrize(("prediction", "zero"), [("eps", False), ("v", False), ("v", True)])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("table", list(TABLES))
def test_ddim(prediction: str, zero: bool, spacing: str, table: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        **TABLES[table], clip_sample=False, prediction_type=NAMES[prediction],
        timestep_spacing=spacing, rescale_betas_zero_snr=zero,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    x, theirs = noise(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t / 1000), t, x).prev_sample
        theirs.append(x)
    fields = {"prediction": prediction, "schedule": table, "zero_terminal_snr": zero}
    assert_equal(ours(fields, noise(), method="ddim", steps=20, spacing=spacing), theirs)


@pytest.mark.parametrize(("prediction", "zero"), [("eps", False), ("v", False), ("v", True)])
@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("table", list(TABLES))
def test_ddim_with_noise(prediction: str, zero: bool, eta: float, table: str) -> None:
    scheduler = diffusers.DDIMScheduler(
        **TABLES[table], clip_sample=False, prediction_type=NAMES[prediction],
        timestep_spacing="leading", rescale_betas_zero_snr=zero,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    x, theirs = noise(), []
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(
            network(x, t / 1000), t, x, eta=eta, variance_noise=noise(step + 1)
        ).prev_sample
        theirs.append(x)
    fields = {"prediction": prediction, "schedule": table, "zero_terminal_snr": zero}
    mine = ours(
        fields, noise(), method="ddim", steps=20, spacing="leading", eta=eta,
        step_noise=lambda step: noise(step + 1),
    )  # fmt: skip
    assert_equal(mine, theirs)


MULTISTEP = {
    "dpmpp_2m": (
        diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}
    ),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_type": "bh2"}),
}  # fmt: skip


@pytest.mark.parametrize("method", list(MULTISTEP))
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 20), ("trailing", 20), ("trailing", 8)])
@pytest.mark.parametrize("table", list(TABLES))
def test_multistep(method: str, prediction: str, spacing: str, steps: int, table: str) -> None:
    kind, options = MULTISTEP[method]
    scheduler = kind(
        **TABLES[table], **options, prediction_type=NAMES[prediction], timestep_spacing=spacing,
        solver_order=2,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    # Their grids differ from DDIM's by an entry: both are given the same times.
    times = [*(float(t) / 1000 for t in scheduler.timesteps), 0.0]
    x, theirs = noise(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t / 1000), t, x).prev_sample
        theirs.append(x)
    fields = {"prediction": prediction, "schedule": table}
    assert_equal(ours(fields, noise(), method=method, times=times), theirs)


@pytest.mark.parametrize("method", list(MULTISTEP))
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_multistep_of_a_flow(method: str, shift: float) -> None:
    """On their grid, which starts just before pure noise."""
    kind, options = MULTISTEP[method]
    scheduler = kind(
        **options, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
        solver_order=2,
    )  # fmt: skip
    scheduler.set_timesteps(12)
    times = scheduler.sigmas.double().tolist()
    assert 0.999 < times[0] < 1.0 and times[-1] == 0.0
    x, theirs = noise(), []
    for t, sigma in zip(scheduler.timesteps, times, strict=False):
        x = scheduler.step(network(x, sigma), t, x).prev_sample
        theirs.append(x)
    assert_equal(ours({}, noise(), method=method, times=times), theirs)


def guided_outputs(x: Tensor, t: Tensor) -> Tensor:
    """Predictions with and without a condition, stacked on the batch."""
    return torch.cat((network(x, t), 0.7 * network(x, t) + 0.1 * torch.cos(x)))


def test_guided_step_of_ddim() -> None:
    """One `solver_step` is guidance in diffusers' convention and then the scheduler's step."""
    scheduler = diffusers.DDIMScheduler(**TABLES["scaled_linear"], clip_sample=False)
    scheduler.set_timesteps(20)
    bar = scheduler.alphas_cumprod.double()
    x = theirs = noise()
    for step, t in enumerate(scheduler.timesteps):
        before = int(t) - 50
        following = bar[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        points = bar[t].sqrt(), (1 - bar[t]).sqrt(), following.sqrt(), (1 - following).sqrt()
        row = solver.solver_coefficients("ddim", "eps", *points)
        x, _ = solver.solver_step(x, guided_outputs(x, t / 1000), row, guidance=torch.tensor([2.5]))
        conditional, unconditional = guided_outputs(theirs, t / 1000).chunk(2)
        output = unconditional + 3.5 * (conditional - unconditional)
        theirs = scheduler.step(output, t, theirs).prev_sample
        assert float((x - theirs).norm() / theirs.norm()) < 1e-5, step


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    ("spacing", "table"),
    # The cosine table's last sigma / alpha is 20,000, of which their float32 leaves four digits.
    [
        *(("leading", table) for table in TABLES),
        ("trailing", "linear"),
        ("trailing", "scaled_linear"),
    ],
)
@pytest.mark.parametrize(
    ("method", "name"),
    [("ddim", "EulerDiscreteScheduler"), ("heun_sigma", "HeunDiscreteScheduler")],
)
def test_rules_in_sigma(method: str, name: str, table: str, spacing: str, prediction: str) -> None:
    """Theirs move x / alpha, from sigma / alpha of the noise; Euler's rule is DDIM's."""
    scheduler = getattr(diffusers, name)(
        **TABLES[table], prediction_type=NAMES[prediction], timestep_spacing=spacing
    )
    scheduler.set_timesteps(15)
    times = [*dict.fromkeys(scheduler.timesteps.tolist())]
    bar = diffusers.DDPMScheduler(**TABLES[table]).alphas_cumprod.double()
    alphas = [*(bar[round(t)].sqrt() for t in times), torch.ones((), dtype=torch.float64)]
    y, theirs = noise() / alphas[0], []
    for call, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(y, t)
        y = scheduler.step(network(scaled.float(), t / 1000), t, y).prev_sample
        if method == "ddim" or call % 2 or call == len(scheduler.timesteps) - 1:
            theirs.append((y * alphas[len(theirs) + 1]).float())
    fields = {"prediction": prediction, "schedule": table}
    times = [*(t / 1000 for t in times), 0.0]
    assert_equal(ours(fields, noise(), method=method, times=times), theirs)


def test_euler_in_sigma_is_ddim_where_alpha_is_one() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**TABLES["scaled_linear"])
    scheduler.set_timesteps(20)
    sigmas, one = scheduler.sigmas.double(), torch.ones((), dtype=torch.float64)
    x = theirs = noise() * float(sigmas[0])
    for step, t in enumerate(scheduler.timesteps):
        points = one, sigmas[step], one, sigmas[step + 1]
        row = solver.solver_coefficients("ddim", "eps", *points)
        scale = float((sigmas[step] ** 2 + 1).sqrt())
        x, _ = solver.solver_step(x, network(x / scale, t / 1000), row)
        scaled = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(network(scaled, t / 1000), t, theirs).prev_sample
        assert float((x - theirs).norm() / theirs.norm()) < 1e-5, step


@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("eps", "fixed_small"), ("eps", "learned_range"), ("v", "fixed_small")],
)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("table", list(TABLES))
def test_ddpm(prediction: str, variance: str, spacing: str, table: str) -> None:
    double = variance == "learned_range"
    scheduler = diffusers.DDPMScheduler(
        **TABLES[table], clip_sample=False, variance_type=variance, timestep_spacing=spacing,
        prediction_type=NAMES[prediction],
    )  # fmt: skip
    scheduler.set_timesteps(25)
    generator = torch.Generator().manual_seed(7)
    x, theirs = noise(), []
    for t in scheduler.timesteps:
        output = network(x, t / 1000, double=double)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        theirs.append(x)
    generator.manual_seed(7)
    draws = [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(25)]
    fields = {"prediction": prediction, "schedule": table}
    fields |= {"variance": "learned_range"} if double else {}
    mine = ours(
        fields, noise(), double=double, method="ddpm", steps=25, spacing=spacing,
        step_noise=lambda step: draws[step],
    )  # fmt: skip
    assert_equal(mine, theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / 20, 20))
    x, theirs = noise(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t / 1000), t, x).prev_sample
        theirs.append(x)
    assert_equal(ours({}, noise(), method="ddim", steps=20, shift=shift), theirs)


def test_flow_euler_on_its_own_grid() -> None:
    """It shifts twice: its ends, and then every point between them."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    x, theirs = noise(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t / 1000), t, x).prev_sample
        theirs.append(x)
    times = scheduler.sigmas.double().tolist()
    assert_equal(ours({}, noise(), method="ddim", times=times), theirs)


def test_flow_heun() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(12)
    x, stages = noise(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t / 1000), t, x).prev_sample
        stages.append(x)
    theirs = [*stages[1::2], stages[-1]]  # two evaluations a step, one in the last
    times = [*dict.fromkeys(scheduler.sigmas.double().tolist())]
    assert_equal(ours({}, noise(), method="heun", times=times), theirs)


@pytest.mark.parametrize("table", list(TABLES))
@pytest.mark.parametrize("zero", [False, True])
def test_tables_and_noising(table: str, zero: bool) -> None:
    scheduler = diffusers.DDPMScheduler(**TABLES[table], rescale_betas_zero_snr=zero)
    objective = Objective(ObjectiveConfig(prediction="v", schedule=table, zero_terminal_snr=zero))
    entries = objective.schedule.coefficients(torch.arange(1000) / 1000)[0]
    torch.testing.assert_close(entries, scheduler.alphas_cumprod.sqrt(), rtol=2e-4, atol=1e-6)
    index = torch.tensor([0, 500, 999])
    x0, eps, t = noise(1), noise(2), index / 1000
    torch.testing.assert_close(
        objective.noise(x0, eps, t), scheduler.add_noise(x0, eps, index), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        objective.target(x0, eps, t), scheduler.get_velocity(x0, eps, index), rtol=1e-4, atol=1e-5
    )
