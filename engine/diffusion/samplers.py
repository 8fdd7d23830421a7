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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from etude.kernels.solver import solver_step

from .classifier_free import Predictor, classifier_free
from .guidance import EntropyGuidance, Pushed
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
            graphs; steps that a guide pushes run as they are, since they take gradients.

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
    plain = Taking(predict, objective, config)
    pushed = replace(plain, guide=guide)
    if guide is not None:
        guide.start(len(noise), noise.device, condition)
    if captured is not None:
        plain = captured.of(plain, noise)
    x, earlier = noise, []
    for step in steps:
        guided = guide is not None and guide.acts(step.index, step.time)
        take = pushed if guided else plain
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
    """Takes the steps of a sampler; a function of tensors where no `guide` pushes each of them."""

    predict: Predictor
    objective: Objective
    config: SamplerConfig
    guide: EntropyGuidance | None = None

    def __call__(self, step: Step, x: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x', x0_hat) of a step at x (B, C, H, W), with `extra` of the same shape."""
        pushed, output = self._evaluate(step, x)
        if self._is_linear(step, x, output):
            return self._solve(step, pushed, output, extra)
        x0, eps, variance = self._estimate(step, pushed, output)
        if step.last:
            return x0, x0
        if self.config.method == "ddpm":
            assert extra is not None
            return _ancestral(step.numbers["rule"], pushed.x, x0, variance, extra), x0
        return self._trapezoid(step, pushed.x, x0, eps), x0

    def _is_linear(self, step: Step, x: Tensor, output: Tensor) -> bool:
        """Whether the step is linear in x, the prediction and the extra tensor."""
        if self.config.method in HEUN:
            return step.last
        learned = self.objective.config.variance == "learned_range"
        return self.config.method != "ddpm" or not learned or output.shape[1] == x.shape[1]

    def _evaluate(self, step: Step, x: Tensor, *, end: bool = False) -> tuple[Pushed, Tensor]:
        """What the guide makes of x, and the network's output there, where the step begins or at
        its end."""
        time, copies = step.numbers["times"][int(end)], step.copies[int(end)]
        guide = self.guide
        if guide is None or not guide.takes_gradient(corrector=end):
            return Pushed(x), self.predict(x, time, copies)
        if guide.traces:
            x = x.detach().requires_grad_()
            output, estimate = self.predict.traced(x, time, copies)
        else:
            output = self.predict(x, time, copies)
            estimate, _ = self._prediction(step, x, output, end)
        t, condition = time.repeat(len(x)), self.predict.condition
        return guide.push(self.objective, x, estimate, t, condition), output

    def _solve(
        self, step: Step, pushed: Pushed, output: Tensor, extra: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A linear step in one pass; what a guide adds to the estimates follows by linearity."""
        guided = step.copies[0] > 1
        row = step.numbers["row"]
        x, x0 = solver_step(
            pushed.x,
            output,
            row,
            guidance=step.numbers["weights"][0] if guided else None,
            guided_channels=self.config.guidance_channels if guided else None,
            extra=extra,
        )
        if pushed.by_x0 is None or pushed.by_eps is None:
            return x, x0
        return x + (row[5] * pushed.by_x0 + row[6] * pushed.by_eps), x0 + pushed.by_x0

    def _prediction(
        self, step: Step, x: Tensor, output: Tensor, end: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction of an output, and the network's variance, if it has one."""
        weights, channels = step.numbers["weights"][int(end)], self.config.guidance_channels
        output = classifier_free(output, x, weights=weights, channels=channels)
        return self.objective.split(output, x)

    def _estimate(
        self, step: Step, pushed: Pushed, output: Tensor, *, end: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x0_hat, eps_hat and the network's variance, if it has one."""
        prediction, variance = self._prediction(step, pushed.x, output, end)
        t = step.numbers["times"][int(end)].repeat(len(pushed.x))
        x0, eps = self.objective.clean(prediction, pushed.x, t)
        if pushed.by_x0 is not None and pushed.by_eps is not None:
            x0, eps = x0 + pushed.by_x0, eps + pushed.by_eps
        return x0, eps, variance

    def _trapezoid(self, step: Step, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """Heun's: the mean of the velocities at x and where Euler's step from there ends."""
        alpha, sigma, total, total_next, width = step.numbers["rule"]
        euler = alpha * x0 + sigma * eps
        evaluated = self._evaluate(step, euler, end=True)
        x0_next, eps_next, _ = self._estimate(step, *evaluated, end=True)
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
