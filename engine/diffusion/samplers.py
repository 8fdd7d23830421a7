"""Samplers: from noise to a clean sample through a denoiser; called by `sampling.py`.

Every step estimates (x0_hat, eps_hat) and moves to the next point of a decreasing grid of times:

    ddim        x' = alpha' x0_hat + sigma' eps_hat   first order; it is Euler's rule both in
                s = sigma / (alpha + sigma), the time of a flow, and in sigma / alpha; with eta, a
                share of ddpm's noise
    dpmpp_2m    DPM-Solver++(2M) (Lu et al. 2022): x0_hat is extrapolated from the two last steps
                in log(alpha / sigma); the first and the last step are of first order
    unipc       UniPC (Zhao et al. 2023): the same, and each estimate also corrects the point it was
                made at; see `unipc.py`
    heun        the trapezoidal rule in s, where x / (alpha + sigma) moves with velocity eps - x0
                whatever the schedule; second order; the last step is Euler's
    heun_sigma  the trapezoidal rule in sigma / alpha (Karras et al. 2022), where x / alpha moves
                with velocity eps; needs a first point that is not pure noise
    ddpm        a draw of the posterior q(x' | x, x0_hat), of the steps that are taken; its noise
                comes from the caller

The last point is always the clean one (alpha' = 1, sigma' = 0), so the result is x0_hat. Steps that
are linear in x, the prediction and one more tensor (all but Heun's and a learned variance's) are
rows of numbers for `solver_step`, which guides, estimates and moves in one pass.

Against diffusers' schedulers, on the same times, every step is the same but for these: x starts as
the noise itself, where Euler's and Heun's start sigma / alpha times it; a table is read at whole
entries, where theirs interpolate for `linspace`; the clean point is always the last one, where
DDIM's and PNDM's may end at the first entry; nothing is clipped to [-1, 1]; and a flow starts at
t = 1, where their multistep rules start at 1 - 1e-6 and take the first step by log(alpha / sigma).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.kernels.solver import solver_coefficients, solver_step

from .guidance import EntropyGuidance, classifier_free, power_cosine, stacked_predictor
from .objectives import Denoiser, Objective, learned_log_variance
from .schedules import posterior
from .unipc import unipc_rows

Method = Literal["ddim", "dpmpp_2m", "unipc", "heun", "heun_sigma", "ddpm"]
HEUN = ("heun", "heun_sigma")


class SamplerConfig(Config):
    """How pictures are drawn; part of an evaluation's protocol."""

    method: Method = option("ddim", "rule of one step; ddim is Euler's on a flow")
    eta: float = option(0.0, "share of ddpm's noise in a ddim step; 0 draws none", ge=0, le=1)
    steps: int = option(50, "steps from noise to a clean sample", unit="steps", gt=0)
    spacing: Literal["linspace", "leading", "trailing"] = option(
        "linspace", "which entries of a table are visited; continuous schedules take linspace"
    )
    shift: float = option(
        1.0, "moves the grid of a continuous schedule toward noise, beyond the objective's", gt=0
    )
    guidance_convention: Literal["lambda", "one_plus_lambda"] = option(
        help="lambda: (1 + scale) cond - scale uncond; one_plus_lambda: diffusers' guidance_scale"
    )
    guidance_scale: float | None = option(None, "classifier-free guidance; none: conditional only")
    control_scale: float | None = option(
        None, "guidance_scale of the control values, by a third evaluation; none: asked for in all"
    )
    guidance_power: float | None = option(
        None, "raise guidance over the steps by the power-cosine; 4 as published for MDTv2", gt=0
    )
    guidance_interval: tuple[float, float] = option(
        (0.0, 1.0), "times in [0, 1] between which classifier-free guidance acts, both included"
    )
    guidance_channels: int | None = option(
        None, "guide only the first channels, as published for DiT (3 of 4); none: all", gt=0
    )

    @model_validator(mode="after")
    def _check(self) -> "SamplerConfig":
        low, high = self.guidance_interval
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(
                f"guidance_interval {self.guidance_interval} must be two times low < high in [0, 1]"
            )
        given = self.control_scale, self.guidance_power, self.guidance_channels
        restricted = self.guidance_interval != (0.0, 1.0) or given != (None, None, None)
        if self.guidance_scale is None and restricted:
            raise ValueError(
                "control_scale, guidance_power, guidance_interval and guidance_channels have no"
                " effect without guidance_scale: set guidance_scale, or leave them out"
            )
        if self.eta and self.method != "ddim":
            raise ValueError(
                f"eta has no effect on method {self.method!r}: leave it out, or set method to ddim"
            )
        return self

    @property
    def draws(self) -> bool:
        """Whether steps take noise from `step_noise`."""
        return self.method == "ddpm" or self.eta > 0

    @property
    def guidance_weights(self) -> tuple[float, ...]:
        """Weights of the differences that guidance adds to the conditional prediction.

        (): it is taken as it is; (w,): the semantic part; (w, u): the semantic and the control
        part, by a third evaluation.
        """
        plain = float(self.guidance_convention == "one_plus_lambda")
        scales = self.guidance_scale, self.control_scale
        semantic, control = (0.0 if scale is None else scale - plain for scale in scales)
        if control:
            return semantic, control
        return (semantic,) if semantic else ()

    def weights_at(self, time: float) -> tuple[float, ...]:
        """`guidance_weights` at a time in [0, 1], where `guidance_power` lets them rise."""
        if self.guidance_power is None:
            return self.guidance_weights
        share = power_cosine(time, self.guidance_power)
        return tuple(weight * share for weight in self.guidance_weights)


def time_grid(objective: Objective, config: SamplerConfig) -> list[float]:
    """The steps + 1 decreasing times of a sampler; the last, 0.0, stands for the clean sample."""
    schedule, steps = objective.schedule, config.steps
    if not schedule.discrete:
        if config.spacing != "linspace":
            raise UserError(
                f"sampler spacing {config.spacing!r} is for tables, but the schedule is"
                f" {schedule.name!r}: set spacing: linspace"
            )
        even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
        shift = config.shift * objective.config.shift
        # As training does: shifted first, so that no time lies beyond the last one trained.
        return (schedule.shifted(even, shift) * objective.last_time).tolist()
    total = schedule.steps
    if steps > total or config.shift != 1.0:
        raise UserError(
            f"sampler steps={steps}, shift={config.shift} do not fit a table of {total} entries:"
            f" set steps to at most {total} and leave out shift"
        )
    if config.spacing == "leading":
        index = (np.arange(steps) * (total // steps))[::-1]
    elif config.spacing == "trailing":
        index = np.round(np.arange(total, 0, -total / steps)) - 1
    else:
        index = np.linspace(0, total - 1, steps).round()[::-1] if steps > 1 else [total - 1]
    return [float(i) / total for i in index] + [0.0]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    objective: Objective,
    config: SamplerConfig,
    noise: Tensor,
    condition: dict[str, Any],
    *,
    nulls: Sequence[dict[str, Any]] = (),
    guide: EntropyGuidance | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int, Tensor, Tensor], None] | None = None,
    times: list[float] | None = None,
) -> Tensor:
    """Draw one sample per row of `noise`; rows do not influence each other.

    Args:
        denoiser: (x (B, C, H, W), t (B,) in [0, 1], condition) -> raw output.
        objective: says what the raw output means.
        noise: (B, C, H, W) standard normal, float32 or float64; fixes the arithmetic's dtype.
        condition: what is asked for, entries of length B.
        nulls: the same entries, asking for less and less: without what guidance_scale weighs, and
            then without what control_scale weighs; as many as there are guidance weights.
        guide: pushes samples toward what a learner finds hard; not under `inference_mode`.
        step_noise: step (0, 1, ...) -> standard normal (B, C, H, W); needed by ddpm and by eta.
        progress: called after each step with (steps done, x, x0_hat).
        times: replaces the grid of `time_grid`: decreasing times followed by 0.0.

    Returns:
        (B, C, H, W) clean samples in the scale the objective was trained on.
    """
    if config.draws and step_noise is None:
        raise ValueError(
            f"method {config.method!r} with eta={config.eta} needs step_noise, a callable from"
            " step to noise"
        )
    times = time_grid(objective, config) if times is None else times
    points = _points(objective, times)
    if config.method == "heun_sigma" and points[0][0] == 0.0:
        raise UserError(
            "method 'heun_sigma' cannot start at pure noise, where sigma / alpha has no value: set"
            " method: heun"
        )
    weights = [config.weights_at(time) for time in times]
    predict = stacked_predictor(
        denoiser,
        condition,
        nulls,
        contrasts=len(config.guidance_weights),
        interval=config.guidance_interval,
    )
    table, mix = _rows(objective, config, points)
    rows = table.to(noise.device, noise.dtype)
    scales = torch.tensor(weights, dtype=noise.dtype).to(noise.device)
    if guide is not None:
        guide.start(len(noise), noise.device)

    def guides(step: int) -> bool:
        return guide is not None and guide.acts(step, times[step])

    def raw(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        return predict(x, t, time), t

    def estimate(
        output: Tensor, x: Tensor, t: Tensor, step: int, *, corrector: bool = False
    ) -> tuple[Any, ...]:
        output = classifier_free(
            output, x, weights=weights[step + corrector], channels=config.guidance_channels
        )
        prediction, variance = objective.split(output, x)
        if guide is not None and guides(step):
            x, x0, eps = guide.push(
                denoiser, objective, x, prediction, t, condition, corrector=corrector
            )
        else:
            x0, eps = objective.clean(prediction, x, t)
        return x, x0, eps, variance

    x, previous, older = noise, None, None
    for step in range(len(times) - 1):
        last, extra = step == len(times) - 2, None
        if config.method == "dpmpp_2m":
            extra = previous
        elif config.method == "unipc" and previous is not None:
            extra = mix[step][0] * previous
            extra = extra if older is None else extra + mix[step][1] * older
        elif config.draws and not last:
            assert step_noise is not None
            extra = step_noise(step).to(x.dtype)
        output, t = raw(x, times[step])
        whole = last or config.method not in HEUN
        if whole and not guides(step) and not _varies(objective, config, output, x):
            guided = len(output) != len(x)
            x, x0 = solver_step(
                x,
                output,
                rows[step],
                guidance=scales[step] if guided else None,
                guided_channels=config.guidance_channels if guided else None,
                extra=extra,
            )
        else:
            x, x0, eps, variance = estimate(output, x, t, step)
            if last:
                x = x0
            elif config.method == "ddpm":
                x = _ancestral(points[step], points[step + 1], x, x0, variance, extra)
            elif config.method in HEUN:
                (alpha, sigma), (alpha_next, sigma_next) = points[step], points[step + 1]
                flow = config.method == "heun"
                total, total_next = alpha + flow * sigma, alpha_next + flow * sigma_next
                width = sigma_next / total_next - sigma / total
                euler = alpha_next * x0 + sigma_next * eps
                corrected = raw(euler, times[step + 1])
                _, x0_next, eps_next, _ = estimate(
                    corrected[0], euler, corrected[1], step, corrector=True
                )
                velocity = 0.5 * ((eps - x0) + (eps_next - x0_next) if flow else eps + eps_next)
                x = (x / total + width * velocity) * total_next
            else:
                from_x, from_x0, from_eps, from_extra = rows[step, 4:]
                x = from_x * x + (from_x0 * x0 + from_eps * eps)
                x = x if extra is None else x + from_extra * extra
        previous, older = x0, previous
        if progress is not None:
            progress(step + 1, x, x0)
    if guide is not None:
        guide.finish(x, condition)
    return x


def _varies(objective: Objective, config: SamplerConfig, output: Tensor, x: Tensor) -> bool:
    """Whether a step draws with a variance of the network's."""
    learned = objective.config.variance == "learned_range" and output.shape[1] != x.shape[1]
    return config.method == "ddpm" and learned


def _rows(
    objective: Objective, config: SamplerConfig, points: list[tuple[float, float]]
) -> tuple[Tensor, list[list[float]]]:
    """`solver_step`'s numbers for every step of a grid, (steps, 8) float64; Heun's are Euler's.

    And, for unipc, the weights of the two last clean estimates in the step's extra tensor.
    """
    alpha, sigma = torch.tensor(points, dtype=torch.float64).unbind(1)
    if config.method == "unipc":
        return unipc_rows(objective.config.prediction, alpha, sigma)
    ways = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    rule = "ddim" if config.method in HEUN else config.method
    rows = solver_coefficients(rule, objective.config.prediction, *ways, eta=config.eta)
    if rule == "dpmpp_2m" and len(points) > 2:
        rows[1:] = solver_coefficients(
            rule,
            objective.config.prediction,
            *(way[1:] for way in ways),
            alpha_previous=alpha[:-2],
            sigma_previous=sigma[:-2],
        )
    return rows, []


def _points(objective: Objective, times: list[float]) -> list[tuple[float, float]]:
    """(alpha, sigma) of every time of the grid, computed once; the last point is clean."""
    alpha, sigma = objective.schedule.coefficients(torch.tensor(times[:-1], dtype=torch.float64))
    return [*zip(alpha.tolist(), sigma.tolist(), strict=True), (1.0, 0.0)]


def _ancestral(
    point: tuple[float, float],
    following: tuple[float, float],
    x: Tensor,
    x0: Tensor,
    variance: Tensor | None,
    noise: Tensor,
) -> Tensor:
    """A draw of q(x' | x, x0_hat); a learned variance (B, C, H, W) replaces the posterior's."""
    step = posterior(*(torch.tensor(c, dtype=torch.float64) for c in (*point, *following)))
    spread = step.variance.sqrt().to(x.dtype)
    if variance is not None:
        smallest, largest = (v.clamp(min=1e-20).to(x) for v in (step.variance, step.largest))
        spread = torch.exp(0.5 * learned_log_variance(variance, smallest, largest))
    return step.mean(x0, x) + spread * noise
