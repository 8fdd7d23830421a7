"""The steps of a sampler before the first is taken: configuration, grid of times, numbers.

Called by `samplers.py`, which states the methods and takes the steps. Everything that a step needs
beside the samples is decided here: what runs in it (its `kind`), and its numbers, which are tensors
on the device. Steps of one kind are one program and differ by their numbers alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.kernels.solver import solver_coefficients

from .classifier_free import power_cosine
from .objectives import Objective
from .schedules import posterior
from .unipc import unipc_rows

Method = Literal["ddim", "dpmpp_2m", "unipc", "heun", "heun_sigma", "ddpm"]
HEUN = ("heun", "heun_sigma")
Numbers = dict[str, Tensor]


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


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        index: 0, 1, ...
        time: where it begins, in [0, 1].
        copies: batches in each of its evaluations of the network: 1, or where guidance acts one
            more than there are weights.
        last: whether it ends at the clean point.
        numbers: in the samples' dtype and on their device:
            times (2,), weights (2, K): of guidance, where the step begins and where it ends
            row (8,): of `solver_step`
            mix (2,): of unipc, what the two last estimates weigh in the extra tensor
            rule: what a step of ddpm (5,) or of Heun (5,) takes beside, see `plan`
    """

    index: int
    time: float
    copies: tuple[int, ...]
    last: bool
    numbers: Numbers

    @property
    def kind(self) -> tuple[tuple[int, ...], bool]:
        """What the step runs, apart from its numbers."""
        return self.copies, self.last


def plan(
    objective: Objective, config: SamplerConfig, times: list[float], like: Tensor
) -> list[Step]:
    """The steps between the times of a grid.

    Args:
        times: decreasing, then 0.0.
        like: has the samples' dtype and device.
    """
    alpha, sigma = _points(objective, times)
    if config.method == "heun_sigma" and alpha[0] == 0.0:
        raise UserError(
            "method 'heun_sigma' cannot start at pure noise, where sigma / alpha has no value: set"
            " method: heun"
        )
    tables = {"times": _both_ends(torch.tensor(times, dtype=torch.float64))}
    weights = [config.weights_at(time) for time in times]
    tables["weights"] = _both_ends(torch.tensor(weights, dtype=torch.float64))
    tables |= _rows(config, objective.config.prediction, alpha, sigma)
    ways = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    if config.method in HEUN:
        tables["rule"] = _trapezoid(*ways, flow=config.method == "heun")
    elif config.method == "ddpm":
        tables["rule"] = _ancestral(*ways)
    tables = {name: table.to(like.device, like.dtype) for name, table in tables.items()}
    low, high = config.guidance_interval
    stack = 1 + len(config.guidance_weights)
    copies = [stack if low <= time <= high else 1 for time in times]
    steps = []
    for i in range(len(times) - 1):
        last = i == len(times) - 2
        evaluations = 2 if config.method in HEUN and not last else 1
        numbers = {name: table[i] for name, table in tables.items()}
        steps.append(Step(i, times[i], tuple(copies[i : i + evaluations]), last, numbers))
    return steps


def _points(objective: Objective, times: list[float]) -> tuple[Tensor, Tensor]:
    """alpha and sigma at the times of a grid, (steps + 1,) float64; the last point is clean."""
    alpha, sigma = objective.schedule.coefficients(torch.tensor(times[:-1], dtype=torch.float64))
    return torch.cat((alpha, alpha.new_ones(1))), torch.cat((sigma, sigma.new_zeros(1)))


def _both_ends(values: Tensor) -> Tensor:
    """(steps + 1, ...) to (steps, 2, ...)."""
    return torch.stack((values[:-1], values[1:]), dim=1)


def _rows(config: SamplerConfig, prediction: str, alpha: Tensor, sigma: Tensor) -> Numbers:
    """`solver_step`'s rows (steps, 8) float64, Euler's for Heun's; and the mix of unipc."""
    if config.method == "unipc":
        rows, mix = unipc_rows(prediction, alpha, sigma)
        return {"row": rows, "mix": torch.tensor(mix, dtype=torch.float64)}
    ways = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    rule = "ddim" if config.method in HEUN else config.method
    rows = solver_coefficients(rule, prediction, *ways, eta=config.eta)
    if rule == "dpmpp_2m" and len(rows) > 1:
        before = {"alpha_previous": alpha[:-2], "sigma_previous": sigma[:-2]}
        rows[1:] = solver_coefficients(rule, prediction, *(way[1:] for way in ways), **before)
    return {"row": rows}


def _ancestral(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """(steps, 5): the posterior's weights of x0 and x, its deviation, and the two bounds of a
    learned variance."""
    step = posterior(alpha, sigma, alpha_next, sigma_next)
    bounds = (bound.clamp(min=1e-20) for bound in (step.variance, step.largest))
    return torch.stack((step.from_x0, step.from_x, step.variance.sqrt(), *bounds), dim=1)


def _trapezoid(
    alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, *, flow: bool
) -> Tensor:
    """(steps, 5): alpha', sigma', what x and x' are divided by, and the way between them."""
    total, total_next = alpha + flow * sigma, alpha_next + flow * sigma_next
    width = sigma_next / total_next - sigma / total
    return torch.stack((alpha_next, sigma_next, total, total_next, width), dim=1)
