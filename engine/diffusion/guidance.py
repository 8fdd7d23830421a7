"""Guidance: classifier-free (Ho and Salimans 2022) and toward what a learner finds hard.

Called by `samplers.py`. Classifier-free guidance contrasts predictions p(semantic, control) of one
network under less and less that is asked for, of which the first alone is the conditional one:

    one weight    p(s, c) + w (p(s, c) - p(0, c))                              two evaluations
    two weights   p(s, c) + w (p(s, c) - p(0, c)) + u (p(0, c) - p(0, 0))      three

which with w = lambda - 1 and u = beta - 1 is p(0, 0) + beta (p(0, c) - p(0, 0)) + lambda (p(s, c) -
p(0, c)). Entropy guidance (Askari-Hemmat et al. 2025, "Improving the Scaling Laws of
Synthetic Data with Deliberate Practice"; the normalised step is that of its predecessor, Hemmat et
al. 2023) samples from a density weighted by exp(omega * H): the score gains omega * grad_x H, where
H is the learner's entropy on the decoded clean estimate. Two modes:

    score         score + omega g, with g = grad_x H. Since eps = -sigma * score,
                  eps_hat <- eps_hat - omega sigma g
                  at a fixed x, hence x0_hat <- x0_hat + omega sigma^2 / alpha g, and for a flow
                  velocity u <- u - omega (sigma + sigma^2 / alpha) g.
                  (The published eq. 7 prints "+ omega g" on eps, which lowers the entropy.)
    norm_matched  x <- x + omega |x| g / |g| with the raw prediction held, norms per sample, so
                  omega is a share of the latent's length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import Config, option

from .objectives import Denoiser, Objective


@dataclass(frozen=True)
class Predictor:
    """What classifier-free guidance needs of a network, in one call on a stacked batch.

    Attributes:
        condition: what is asked for, entries of length B.
        stacked: it and those that ask for less, one after another.
    """

    denoiser: Denoiser
    condition: dict[str, Any]
    stacked: dict[str, Any]

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        condition: dict[str, Any],
        nulls: Sequence[dict[str, Any]],
        contrasts: int,
    ) -> "Predictor":
        """Stacks the condition on the first `contrasts` of `nulls`, which ask for ever less."""
        if len(nulls) < contrasts:
            raise ValueError(
                f"classifier-free guidance needs nulls: {contrasts} conditions that ask for less"
                f" and less, not {len(nulls)}"
            )
        stacked = _concatenate(condition, *nulls[:contrasts]) if contrasts else {}
        return cls(denoiser, condition, stacked)

    def __call__(self, x: Tensor, time: Tensor, copies: int) -> Tensor:
        """Raw output at x (B, C, H, W) and a time () in [0, 1].

        Args:
            copies: 1: under the condition alone, (B, ...); else how many conditions are stacked,
                (copies B, ...) in their order.
        """
        t = time.repeat(copies * len(x))
        if copies == 1:
            return self.denoiser(x, t, self.condition)
        return self.denoiser(torch.cat((x,) * copies), t, self.stacked)


def power_cosine(time: float, power: float) -> float:
    """Share of a guidance weight at a time: 0 at pure noise, 1 at the end (MDTv2; power 4)."""
    return 0.5 * (1.0 - math.cos(math.pi * (1.0 - time) ** power))


def classifier_free(
    output: Tensor, x: Tensor, *, weights: Tensor, channels: int | None = None
) -> Tensor:
    """The guided prediction of a `Predictor`'s output at x: (B, ...).

    Args:
        weights: (K,), of the differences between neighbours of the stack; 0 leaves one out.
        channels: guide only the first channels of the prediction; the others, and a learned
            variance, are the conditional ones.
    """
    if len(output) == len(x):
        return output
    parts = output.chunk(1 + len(weights))
    count = x.shape[1] if channels is None else min(channels, x.shape[1])
    guided = parts[0][:, :count]
    for weight, more, less in zip(weights, parts[:-1], parts[1:], strict=True):
        # In the weight's dtype: in bfloat16 the weight itself would be rounded.
        step = weight * (more[:, :count] - less[:, :count]).to(weight.dtype)
        guided = guided + step.to(guided.dtype)
    return torch.cat((guided, parts[0][:, count:]), dim=1)


def _concatenate(*parts: Any) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {name: _concatenate(*(part[name] for part in parts)) for name in first}
    return (
        torch.cat(parts) if isinstance(first, Tensor) else [row for part in parts for row in part]
    )


class GuidanceConfig(Config):
    """How strongly, where and through what samples are pushed toward what a learner finds hard."""

    omega: float = option(0.05, "strength; 0 is plain sampling, bit for bit", ge=0)
    mode: Literal["norm_matched", "score"] = option(
        "norm_matched", "norm_matched: omega is a share of |x|; score: omega multiplies the score"
    )
    criterion: Literal["entropy", "loss"] = option(
        "entropy", "what is raised: the learner's entropy, or its loss on the label asked for"
    )
    path: Literal["full", "stop_denoiser"] = option(
        "full", "stop_denoiser holds the network's output fixed: cheaper, an approximate gradient"
    )
    every: int = option(5, "guide every k-th step, from the first", unit="steps", gt=0)
    interval: tuple[float, float] = option(
        (0.0, 1.0), "times in [0, 1] between which guidance acts, both included"
    )
    blend: bool = option(False, "decode (1 - sigma) x + sigma x0_hat in place of x0_hat")
    ceiling: float = option(
        1.0, "leave a sample alone above this share of the largest entropy", gt=0, le=1
    )

    @model_validator(mode="after")
    def _check(self) -> "GuidanceConfig":
        low, high = self.interval
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"interval {self.interval} must be two times low < high in [0, 1]")
        return self


class EntropyGuidance:
    """Pushes every sample of a batch on its own; hand a new or used one to `sample`."""

    def __init__(
        self,
        config: GuidanceConfig,
        learner: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
    ) -> None:
        """
        Args:
            learner: pictures (B, ...) -> logits (B, classes); a module is used in eval mode with
                frozen parameters and is handed back as it was.
            decode: latents (B, C, H, W) in the objective's scale -> what the learner takes,
                differentiable; resizing and the learner's normalisation belong here.
        """
        self.config = config
        self.learner = learner
        self.decode = decode
        self._report: dict[str, Tensor] = {}

    def start(self, count: int, device: torch.device) -> None:
        """Clear the telemetry for a batch of `count` samples."""
        self._report = {"nonfinite": torch.zeros(count, device=device)}

    def acts(self, step: int, time: float) -> bool:
        """Whether step number `step`, at this time, is guided."""
        low, high = self.config.interval
        due = step % self.config.every == 0 and low <= time <= high
        return self.config.omega > 0 and due

    def push(
        self,
        denoiser: Denoiser,
        objective: Objective,
        x: Tensor,
        prediction: Tensor,
        t: Tensor,
        condition: dict[str, Any],
        *,
        corrector: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Guided (x, x0_hat, eps_hat) of one evaluation.

        Args:
            prediction: (B, C, H, W) the step's own prediction, with classifier-free guidance.
            corrector: the second evaluation of a Heun step, where x was moved already.
        """
        x0, eps = objective.clean(prediction, x, t)
        if corrector and self.config.mode == "norm_matched":
            return x, x0, eps
        gradient = self.gradient(denoiser, objective, x, prediction, t, condition)
        if self.config.mode == "norm_matched":
            length, size = (_norm(a) for a in (gradient, x))
            # A zero gradient has no direction: that sample stays where it is.
            unit = gradient / torch.where(length > 0, length, torch.ones_like(length))
            x = x + self.config.omega * size * unit
            return x, *objective.clean(prediction, x, t)
        alpha, sigma = (c.view(-1, *[1] * (x.ndim - 1)) for c in objective.schedule.coefficients(t))
        # Where alpha is zero, x says nothing about x_0 and the guided score is not defined.
        defined = alpha > 0
        lift = torch.where(defined, sigma**2 / torch.where(defined, alpha, 1.0), 0.0)
        eps = eps - self.config.omega * torch.where(defined, sigma, 0.0) * gradient
        return x, x0 + self.config.omega * lift * gradient, eps

    def gradient(
        self,
        denoiser: Denoiser,
        objective: Objective,
        x: Tensor,
        prediction: Tensor,
        t: Tensor,
        condition: dict[str, Any],
    ) -> Tensor:
        """Gradient (B, C, H, W) of each sample's criterion by its own x; zero where not finite.

        The clean estimate is the conditional one, not the classifier-free extrapolation, except
        with `stop_denoiser`, which reuses the step's prediction.
        """
        with torch.enable_grad(), _frozen(self.learner):
            x = x.detach().requires_grad_()
            if self.config.path == "full":
                prediction, _ = objective.split(denoiser(x, t, condition), x)
            else:
                prediction = prediction.detach()
            x0, _ = objective.clean(prediction, x, t)
            if self.config.blend:
                sigma = objective.schedule.sigma(t).view(-1, *[1] * (x.ndim - 1))
                x0 = sigma * x0 + (1.0 - sigma) * x
            logits = self.learner(self.decode(x0)).to(x.dtype)
            values = self._criterion(logits, condition)
            (gradient,) = torch.autograd.grad(values.sum(), x)
        finite = gradient.flatten(1).isfinite().all(1) & values.isfinite()
        self._count("nonfinite", (~finite).to(torch.float32))
        wanted = finite & (entropy(logits.detach()) <= self.config.ceiling * _largest(logits))
        return torch.where(wanted.view(-1, *[1] * (x.ndim - 1)), gradient, 0.0)

    def finish(self, x0: Tensor, condition: dict[str, Any]) -> None:
        """Measure the finished samples for the telemetry."""
        with torch.no_grad(), _frozen(self.learner):
            logits = self.learner(self.decode(x0)).float()
        self._report["entropy"] = entropy(logits)
        if "labels" in condition:
            self._report["agreement"] = (logits.argmax(1) == condition["labels"]).float()

    def telemetry(self) -> dict[str, np.ndarray]:
        """Float32 arrays of length B for the last batch: the final entropy in nats ("entropy"),
        whether the learner's class is the label asked for ("agreement"), and the number of steps
        left out for a gradient that was not finite ("nonfinite")."""
        return {name: values.float().cpu().numpy() for name, values in self._report.items()}

    def _criterion(self, logits: Tensor, condition: dict[str, Any]) -> Tensor:
        if self.config.criterion == "loss":
            return F.cross_entropy(logits, condition["labels"], reduction="none")
        return entropy(logits)

    def _count(self, name: str, values: Tensor) -> None:
        self._report[name] = self._report.get(name, torch.zeros_like(values)) + values


def entropy(logits: Tensor) -> Tensor:
    """Entropy (B,) in nats of the softmax of logits (B, classes)."""
    log_probability = F.log_softmax(logits, dim=1)
    return -(log_probability.exp() * log_probability).sum(1)


def _largest(logits: Tensor) -> float:
    # Rounding can lift a uniform distribution's entropy above log C; a ceiling of 1 means none.
    return float(np.log(logits.shape[1])) * (1.0 + 1e-6)


def _norm(x: Tensor) -> Tensor:
    """Length of each sample, broadcastable against x."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


@contextmanager
def _frozen(learner: Callable) -> Iterator[None]:
    """A module in eval mode with frozen parameters inside the block; as it was afterwards."""
    if not isinstance(learner, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in learner.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in learner.parameters()]
    try:
        learner.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
