"""Guidance toward what a learner finds hard; called by `samplers.py`.

Entropy guidance (Askari-Hemmat et al. 2025, "Improving the Scaling Laws of Synthetic Data with
Deliberate Practice"; the normalised step is that of its predecessor, Hemmat et al. 2023) samples
from a density weighted by exp(omega * H): the score gains omega * grad_x H, where H is the
learner's entropy on the decoded clean estimate, or another criterion of `criteria.py`. Two modes:

    score         score + omega g, with g = grad_x H. Since eps = -sigma * score,
                  eps_hat <- eps_hat - omega sigma g
                  at a fixed x, hence x0_hat <- x0_hat + omega sigma^2 / alpha g, and for a flow
                  velocity u <- u - omega (sigma + sigma^2 / alpha) g.
                  (The published eq. 7 prints "+ omega g" on eps, which lowers the entropy.)
    norm_matched  x <- x + omega |x| g / |g| with the raw prediction held, norms per sample, so
                  omega is a share of the latent's length.

What a guided step costs beside a plain one, for each sample: the decoder and the learner, forward
and backward, and with `path: full` one backward of the network by its input. The clean estimate is
that of the step's own conditional prediction, so no path asks the network once more; but one with
activation checkpointing, as Stable Diffusion's U-Net, computes that prediction again in its
backward pass. Of 30 steps under classifier-free guidance six are pushed at the published frequency:
Stable Diffusion 1.5 at 512 x 512, with ViT-B/16 as learner (a forward takes 0.803 Tflop in the
U-Net, 2.515 in the decoder, 0.035 in the learner), then takes 1.70 times the operations of plain
sampling without checkpointing, 1.79 with that of the U-Net, and 2.09 with one of the decoder too,
which decoding few rows at a time spares (`decode_rows`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import Config, option
from etude.core.errors import UserError

from .criteria import LABEL_AWARE, CriterionName, criterion, entropy, hardness
from .objectives import Objective


class GuidanceConfig(Config):
    """How strongly, where and through what samples are pushed toward what a learner finds hard."""

    omega: float = option(0.05, "strength; 0 is plain sampling, bit for bit", ge=0)
    mode: Literal["norm_matched", "score"] = option(
        "norm_matched", "norm_matched: omega is a share of |x|; score: omega multiplies the score"
    )
    criterion: CriterionName = option(
        "entropy",
        "what is raised: the learner's entropy; its loss on the label asked for; margin: 1 minus"
        " the lead of its first answer; entropy_label: entropy minus label_weight times loss",
    )
    label_weight: float = option(0.5, "weight of the loss in entropy_label", gt=0)
    path: Literal["full", "stop_denoiser"] = option(
        "full", "stop_denoiser holds the network's output fixed: cheaper, an approximate gradient"
    )
    every: int = option(5, "guide every k-th step, from the first", unit="steps", gt=0)
    interval: tuple[float, float] = option(
        (0.0, 1.0), "times in [0, 1] between which guidance acts, both included"
    )
    blend: bool = option(False, "decode (1 - sigma) x + sigma x0_hat in place of x0_hat")
    ceiling: float | None = option(
        None,
        "leave a sample alone above this share of an even guess: of log(classes) for entropy,"
        " entropy_label and loss, of 1 for margin; none: never",
        gt=0,
        le=1,
    )
    keep_label: bool = option(
        False,
        "where the learner gives another answer, lower its loss on the label asked for, above the"
        " ceiling too",
    )
    decoder: str = option(
        "", "folder of a cheaper decoder of the same latents for the push; empty: the generator's"
    )
    decode_precision: Literal["fp32", "bf16"] = option(
        "fp32", "arithmetic of the decoder and the learner in the push; bf16 is autocast"
    )
    decode_rows: int = option(
        0,
        "pictures decoded at a time in the push, to bound memory; 0, or more than the generator"
        " bears: as many as it does",
        unit="pictures",
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> "GuidanceConfig":
        low, high = self.interval
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"interval {self.interval} must be two times low < high in [0, 1]")
        if self.criterion != "entropy_label" and self.differs("label_weight"):
            raise ValueError(
                f"label_weight has no effect on criterion {self.criterion!r}: leave it out, or set"
                " criterion: entropy_label"
            )
        return self

    @property
    def needs_labels(self) -> bool:
        """Whether the push depends on the label that a sample is asked by."""
        return self.keep_label or self.criterion in LABEL_AWARE


@dataclass(frozen=True)
class Pushed:
    """An evaluation that a guide may have pushed: x (B, C, H, W), which may have moved, and what is
    added to the estimates x0_hat and eps_hat there, or None."""

    x: Tensor
    by_x0: Tensor | None = None
    by_eps: Tensor | None = None


class EntropyGuidance:
    """Pushes every sample of a batch on its own; hand a new or used one to `sample`.

    Attributes:
        passes: backward passes through the denoiser since `start`; each has a row for every sample.
        pictures: the last batch's finished samples, decoded; None before its end.
    """

    def __init__(
        self,
        config: GuidanceConfig,
        learner: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        *,
        cheap_decode: Callable[[Tensor], Tensor] | None = None,
        most_rows: int = 0,
    ) -> None:
        """
        Args:
            learner: pictures (B, ...) -> logits (B, classes); a module is used in eval mode with
                frozen parameters and is handed back as it was.
            decode: latents (B, C, H, W) in the objective's scale -> what the learner takes,
                differentiable; resizing and the learner's normalisation belong to the learner.
            cheap_decode: what `config.decoder` names; replaces `decode` in the push, not for the
                finished samples.
            most_rows: pictures that are decoded at a time in the push, at most; 0: any number.
        """
        if bool(config.decoder) != (cheap_decode is not None):
            raise ValueError(
                f"guidance.decoder={config.decoder!r} names what cheap_decode is: hand over both,"
                " or neither"
            )
        self.config, self.learner, self.decode = config, learner, decode
        self.passes = 0
        self.pictures: Tensor | None = None
        self._decode_push = cheap_decode or decode
        self._rows = min((n for n in (config.decode_rows, most_rows) if n), default=0)
        self._report: dict[str, Tensor] = {}

    def start(self, count: int, device: torch.device, condition: dict[str, Any]) -> None:
        """Clear counts and telemetry for a batch of `count` samples asked for by `condition`.

        Raises:
            UserError: the push depends on labels, and there are none.
        """
        if self.config.needs_labels and "labels" not in condition:
            what = "keep_label" if self.config.keep_label else f"criterion {self.config.criterion}"
            raise UserError(
                f"guidance: {what} needs a label for each sample, but none is asked by one: set"
                " guidance.criterion to entropy or margin and leave out guidance.keep_label"
            )
        self.passes, self.pictures = 0, None
        self._report = {name: torch.zeros(count, device=device) for name in ("nonfinite", "held")}

    def acts(self, step: int, time: float) -> bool:
        """Whether step number `step`, at this time, is guided."""
        low, high = self.config.interval
        due = step % self.config.every == 0 and low <= time <= high
        return self.config.omega > 0 and due

    def takes_gradient(self, *, corrector: bool) -> bool:
        """Whether an evaluation of a guided step is pushed.

        Args:
            corrector: it is the second one of a Heun step, where x was moved already.
        """
        return self.config.mode == "score" or not corrector

    @property
    def traces(self) -> bool:
        """Whether `push` needs the graph of the network's output."""
        return self.config.path == "full"

    def push(
        self, objective: Objective, x: Tensor, output: Tensor, t: Tensor, condition: dict[str, Any]
    ) -> Pushed:
        """What one evaluation becomes: see the two modes above.

        Args:
            output: raw, at (x (B, C, H, W), t (B,)). Where `traces`: under the condition alone,
                with its graph back to x, a leaf. Else the step's own prediction.
        """
        gradient = self.gradient(objective, x, output, t, condition)
        omega, x = self.config.omega, x.detach()
        if self.config.mode == "norm_matched":
            length, size = (_norm(a) for a in (gradient, x))
            # A zero gradient has no direction: that sample stays where it is.
            unit = gradient / torch.where(length > 0, length, torch.ones_like(length))
            return Pushed(x + omega * size * unit)
        alpha, sigma = (c.view(-1, *[1] * (x.ndim - 1)) for c in objective.schedule.coefficients(t))
        # Where alpha is zero, x says nothing about x_0 and the guided score is not defined.
        defined = alpha > 0
        lift = torch.where(defined, sigma**2 / torch.where(defined, alpha, 1.0), 0.0)
        sigma = torch.where(defined, sigma, 0.0)
        return Pushed(x, omega * lift * gradient, -omega * sigma * gradient)

    def gradient(
        self, objective: Objective, x: Tensor, output: Tensor, t: Tensor, condition: dict[str, Any]
    ) -> Tensor:
        """Gradient (B, C, H, W) of each sample's criterion by its own x; zero where it is not
        finite, or where the configuration leaves the sample alone.

        The clean estimate is the conditional one, not the classifier-free extrapolation, except
        with `stop_denoiser`, which reuses the step's prediction. Arguments: see `push`.
        """
        with torch.enable_grad():
            if self.traces:
                self.passes += 1
            else:
                x, output = x.detach().requires_grad_(), output.detach()
            x0, _ = objective.clean(output, x, t)
            if self.config.blend:
                sigma = objective.schedule.sigma(t).view(-1, *[1] * (x.ndim - 1))
                x0 = sigma * x0 + (1.0 - sigma) * x
        pull, finite, held = self._pull(x0.detach(), condition.get("labels"))
        # Of unit size on its way through a network whose half precision would lose a small one.
        size = _norm(pull) / math.sqrt(pull[0].numel())
        size = torch.where(size > 0, size, torch.ones_like(size))
        gradient = size * torch.autograd.grad(x0, x, pull / size)[0]
        finite = finite & gradient.flatten(1).isfinite().all(1)
        for name, rows in (("nonfinite", ~finite), ("held", held & finite)):
            self._report[name] = self._report.get(name, 0.0) + rows.to(torch.float32)
        return torch.where((finite & ~held).view(-1, *[1] * (x.ndim - 1)), gradient, 0.0)

    def finish(self, x0: Tensor, condition: dict[str, Any]) -> None:
        """Decode the finished samples and measure them for the telemetry."""
        with torch.no_grad(), _frozen(self.learner):
            self.pictures = self.decode(x0)
            logits = self.learner(self.pictures).float()
        self._report["entropy"] = entropy(logits)
        if "labels" in condition:
            self._report["agreement"] = (logits.argmax(1) == condition["labels"]).float()

    def telemetry(self) -> dict[str, np.ndarray]:
        """Float32 arrays of length B for the last batch: the final entropy in nats ("entropy"),
        whether the learner's class is the label asked for ("agreement"), and the numbers of guided
        evaluations that left a sample alone: for a gradient that was not finite ("nonfinite"), and
        as `ceiling` asks ("held")."""
        return {name: values.float().cpu().numpy() for name, values in self._report.items()}

    def _pull(self, x0: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of clean estimates (B, C, H, W), some rows at a time: each criterion's gradient by its
        own estimate (B, C, H, W), whether both are finite, and whether to leave it alone (B,)."""
        rows = self._rows or len(x0)
        starts = range(0, len(x0), rows)
        with torch.enable_grad(), _frozen(self.learner):
            parts = [
                self._pull_rows(x0[i : i + rows], None if labels is None else labels[i : i + rows])
                for i in starts
            ]
        pull, finite, held = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return pull, finite, held

    def _pull_rows(self, x0: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        config, x0 = self.config, x0.requires_grad_()
        bf16 = config.decode_precision == "bf16"
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
            # A learner takes pictures in full precision: a CPU resizes no others.
            logits = self.learner(self._decode_push(x0).to(x0.dtype))
        logits = logits.to(x0.dtype)
        held = lost = torch.zeros(len(x0), dtype=torch.bool, device=x0.device)
        if config.needs_labels:
            assert labels is not None
            # The rows of a padded block are asked for without a class: they have no loss.
            held = labels >= logits.shape[1]
            labels = labels.clamp(max=logits.shape[1] - 1)
        values = criterion(config.criterion, logits, labels, config.label_weight)
        if config.keep_label:
            lost = logits.detach().argmax(1) != labels
            values = torch.where(lost, -criterion("loss", logits, labels, 0.0), values)
        (pull,) = torch.autograd.grad(values.sum(), x0)
        logits = logits.detach()
        if config.ceiling is not None:
            # Rounding can lift an even guess above 1.
            limit = config.ceiling * (1.0 + 1e-6)
            held = held | (hardness(config.criterion, logits, labels) > limit) & ~lost
        return pull, values.detach().isfinite() & pull.flatten(1).isfinite().all(1), held


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
