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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from etude.kernels.solver import solver_step

from .guidance import EntropyGuidance, Predictor, classifier_free
from .objectives import Denoiser, Objective, learned_log_variance
from .steps import HEUN, SamplerConfig, Step, plan, time_grid

if TYPE_CHECKING:
    from .captured import CapturedSteps


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
    captured: "CapturedSteps | None" = None,
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
        captured: holds the steps of the network that `denoiser` calls from batch to batch, as CUDA
            graphs; without effect beside a guide, which takes gradients.

    Returns:
        (B, C, H, W) clean samples in the scale the objective was trained on.
    """
    if config.draws and step_noise is None:
        raise ValueError(
            f"method {config.method!r} with eta={config.eta} needs step_noise, a callable from"
            " step to noise"
        )
    steps = plan(objective, config, times or time_grid(objective, config), noise)
    predict = Predictor.of(denoiser, condition, nulls, len(config.guidance_weights))
    take = Taking(predict, objective, config, guide)
    if guide is not None:
        guide.start(len(noise), noise.device)
    elif captured is not None:
        take = captured.of(take, noise)
    x, earlier = noise, []
    for step in steps:
        x, x0 = take(step, x, _extra(step, config, earlier, step_noise))
        earlier = [x0, *earlier[:1]]
        if progress is not None:
            progress(step.index + 1, x, x0)
    if guide is not None:
        guide.finish(x, condition)
    return x


def _extra(
    step: Step,
    config: SamplerConfig,
    earlier: Sequence[Tensor],
    step_noise: Callable[[int], Tensor] | None,
) -> Tensor | None:
    """What a step adds beside x and the prediction: noise, or the clean estimates before it."""
    if config.draws and not step.last:
        assert step_noise is not None
        return step_noise(step.index).to(step.numbers["row"].dtype)
    if not earlier or config.method not in ("dpmpp_2m", "unipc"):
        return None
    if config.method == "dpmpp_2m":
        return earlier[0]
    mixed = [weight * x0 for weight, x0 in zip(step.numbers["mix"], earlier, strict=False)]
    return sum(mixed[1:], mixed[0])


@dataclass(frozen=True)
class Taking:
    """Takes the steps of a sampler; a function of tensors but where a `guide` pushes."""

    predict: Predictor
    objective: Objective
    config: SamplerConfig
    guide: EntropyGuidance | None = None

    def __call__(self, step: Step, x: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x', x0_hat) of a step at x (B, C, H, W), with `extra` of the same shape."""
        output = self.predict(x, step.numbers["times"][0], step.copies[0])
        if self._is_linear(step, x, output):
            guided = step.copies[0] > 1
            return solver_step(
                x,
                output,
                step.numbers["row"],
                guidance=step.numbers["weights"][0] if guided else None,
                guided_channels=self.config.guidance_channels if guided else None,
                extra=extra,
            )
        x, x0, eps, variance = self._estimate(step, x, output)
        if step.last:
            return x0, x0
        if self.config.method == "ddpm":
            assert extra is not None
            return _ancestral(step.numbers["rule"], x, x0, variance, extra), x0
        if self.config.method in HEUN:
            return self._trapezoid(step, x, x0, eps), x0
        from_x, from_x0, from_eps, from_extra = step.numbers["row"][4:]
        x = from_x * x + (from_x0 * x0 + from_eps * eps)
        return (x if extra is None else x + from_extra * extra), x0

    def _is_linear(self, step: Step, x: Tensor, output: Tensor) -> bool:
        """Whether the step is linear in x, the prediction and the extra tensor."""
        if self._pushes(step) or (self.config.method in HEUN and not step.last):
            return False
        learned = self.objective.config.variance == "learned_range"
        return self.config.method != "ddpm" or not learned or output.shape[1] == x.shape[1]

    def _pushes(self, step: Step) -> bool:
        return self.guide is not None and self.guide.acts(step.index, step.time)

    def _estimate(
        self, step: Step, x: Tensor, output: Tensor, *, end: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x, which the guide may move, x0_hat, eps_hat and the network's variance, if it has one,
        from an evaluation at x where the step begins, or at its end."""
        time, weights = (step.numbers[name][int(end)] for name in ("times", "weights"))
        channels = self.config.guidance_channels
        output = classifier_free(output, x, weights=weights, channels=channels)
        prediction, variance = self.objective.split(output, x)
        t = time.repeat(len(x))
        if not self._pushes(step):
            return x, *self.objective.clean(prediction, x, t), variance
        assert self.guide is not None
        denoiser, condition = self.predict.denoiser, self.predict.condition
        pushed = self.guide.push(
            denoiser, self.objective, x, prediction, t, condition, corrector=end
        )
        return *pushed, variance

    def _trapezoid(self, step: Step, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """Heun's: the mean of the velocities at x and where Euler's step from there ends."""
        alpha, sigma, total, total_next, width = step.numbers["rule"]
        euler = alpha * x0 + sigma * eps
        output = self.predict(euler, step.numbers["times"][1], step.copies[1])
        _, x0_next, eps_next, _ = self._estimate(step, euler, output, end=True)
        if self.config.method == "heun":
            velocity = 0.5 * ((eps - x0) + (eps_next - x0_next))
        else:
            velocity = 0.5 * (eps + eps_next)
        return (x / total + width * velocity) * total_next


def _ancestral(
    rule: Tensor, x: Tensor, x0: Tensor, variance: Tensor | None, noise: Tensor
) -> Tensor:
    """A draw of q(x' | x, x0_hat); a learned variance (B, C, H, W) replaces the posterior's."""
    from_x0, from_x, spread, smallest, largest = rule
    if variance is not None:
        spread = torch.exp(0.5 * learned_log_variance(variance, smallest, largest))
    return from_x0 * x0 + from_x * x + spread * noise
