"""What a denoiser is trained to predict, and what its prediction says about the clean sample.

Called by training (`losses`), samplers and guidance (`clean`). With x_t = alpha x_0 + sigma eps a
network predicts one of

    flow   eps - x_0                       (Lipman et al. 2023; SD3's sign: t = 1 is noise)
    eps    eps                             (Ho et al. 2020)
    v      alpha eps - sigma x_0           (Salimans and Ho 2022)

Any of them goes with any schedule. The squared error is one of the prediction, unweighted, or
weighted as that of x_0 with its weight capped (`weighting: min_snr`; Hang et al. 2023): with
SNR = alpha^2 / sigma^2,

    weight = min(SNR, gamma) (d x_0 / d prediction)^2 = min(alpha^2, gamma sigma^2) / k^2

    k = alpha + sigma (flow), alpha (eps), alpha^2 + sigma^2 (v)

which for alpha^2 + sigma^2 = 1 is the published min(SNR, gamma) / SNR of eps and
min(SNR, gamma) / (SNR + 1) of v. A denoiser is a callable (x (B, C, H, W), t (B,) in [0, 1],
condition) -> raw output (B, C, H, W), or (B, 2 C, H, W) whose second half is a variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.kernels.noising import diffuse, diffusion_loss

from .schedules import BETAS, TABLES, Schedule, ScheduleName

Denoiser = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
NO_VARIANCE = (
    "objective.variance 'learned_range' needs a network that returns one:"
    " set model.learn_sigma to true, or objective.variance to fixed"
)


@dataclass(frozen=True)
class Noise:
    """Noise by position, drawn where it is used: what `core.rng.normal` would give, never stored.

    positions: (B,) int64 on the latents' device; seed and stream: the key of `core.rng`.
    """

    positions: Tensor
    seed: int
    stream: int


class ObjectiveConfig(Config):
    """Prediction, schedule and distribution of times."""

    prediction: Literal["flow", "eps", "v"] = option("flow", "what the network predicts")
    schedule: ScheduleName = option("flow", "how signal and noise are mixed over time")
    train_steps: int = option(1000, "entries of a table", gt=1)
    beta_start: float | None = option(None, "first beta of a linear table; none: as published")
    beta_end: float | None = option(None, "last beta of a linear table; none: as published")
    zero_terminal_snr: bool = option(False, "make the last entry of a table pure noise")
    shift: float = option(1.0, "divides the signal-to-noise amplitude; for larger pictures", gt=0)
    timesteps: Literal["uniform", "logit_normal"] = option("uniform", "distribution of times")
    logit_mean: float = option(0.0, "mean of the logit-normal times")
    logit_std: float = option(1.0, "standard deviation of the logit-normal times", gt=0)
    weighting: Literal["none", "min_snr"] = option(
        "none", "weight of a time's squared error; min_snr: that of x_0, capped at weighting_gamma"
    )
    weighting_gamma: float = option(5.0, "largest weight of min_snr", gt=0)
    variance: Literal["fixed", "learned_range"] = option(
        "fixed", "learned_range: train the second half of the output by the variational bound"
    )

    @model_validator(mode="after")
    def _check(self) -> "ObjectiveConfig":
        table = self.schedule in TABLES
        betas = self.beta_start is not None or self.beta_end is not None
        useless = {"beta_start and beta_end": betas and self.schedule not in BETAS}
        useless["zero_terminal_snr"] = self.zero_terminal_snr and not table
        for names, given in useless.items():
            if given:
                raise ValueError(
                    f"{names}: no effect on schedule {self.schedule!r}; leave out, or set schedule"
                    " to linear"
                )
        self._refuse_idle(table)
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "prediction 'eps' says nothing at zero_terminal_snr's last entry: set prediction: v"
            )
        if self.variance == "learned_range" and not (table and self.prediction == "eps"):
            raise ValueError(
                "variance 'learned_range' is defined for prediction 'eps' on a table:"
                " set schedule: linear, or variance: fixed"
            )
        return self

    def _refuse_idle(self, table: bool) -> None:
        idle = []
        if not table:
            idle.append(("train_steps", "schedule: linear"))
        if self.timesteps != "logit_normal":
            idle += [(name, "timesteps: logit_normal") for name in ("logit_mean", "logit_std")]
        if self.weighting != "min_snr":
            idle.append(("weighting_gamma", "weighting: min_snr"))
        for name, wanted in idle:
            if self.differs(name):
                raise ValueError(f"{name} has no effect here: leave it out, or set {wanted}")


class Objective:
    """Noising, targets, losses and clean estimates; arithmetic in float32, or float64 if given."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.schedule = Schedule(
            config.schedule,
            steps=config.train_steps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            zero_terminal_snr=config.zero_terminal_snr,
            shift=config.shift,
        )

    @property
    def last_time(self) -> float:
        """The noisiest time in use, where sampling starts.

        An eps prediction cannot give x_0 where alpha is zero, so on a continuous schedule that
        prediction is trained and sampled up to 0.999 only.
        """
        if self.schedule.discrete:
            return (self.schedule.steps - 1) / self.schedule.steps
        return 0.999 if self.config.prediction == "eps" else 1.0

    def times(self, u: Tensor) -> Tensor:
        """Uniform numbers in [0, 1), (B,), to training times (B,) in [0, 1]."""
        t = u.to(torch.promote_types(u.dtype, torch.float32))
        if self.config.timesteps == "logit_normal":
            # Uniforms have 24 bits; half a unit keeps the two ends finite.
            normal = torch.special.ndtri(t.double().clamp(2.0**-25, 1.0 - 2.0**-25))
            logit = self.config.logit_mean + self.config.logit_std * normal
            t = torch.sigmoid(logit).to(t.dtype)
        t = self.schedule.snap(t)
        return t if self.schedule.discrete else t * self.last_time

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t for clean x0 (B, ...), noise eps (B, ...) and times t (B,)."""
        alpha, sigma = self._coefficients(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should return at (x_t, t)."""
        if self.config.prediction == "flow":
            return eps - x0
        if self.config.prediction == "eps":
            return eps
        alpha, sigma = self._coefficients(t, x0)
        return alpha * eps - sigma * x0

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Factor of the squared error at points (alpha, sigma) of the schedule; None is one."""
        if self.config.weighting == "none":
            return None
        slope = {"flow": alpha + sigma, "eps": alpha, "v": alpha**2 + sigma**2}
        capped = torch.minimum(alpha**2, self.config.weighting_gamma * sigma**2)
        return capped / slope[self.config.prediction] ** 2

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A raw output into the prediction, in x's dtype, and the variance half or None.

        A second half that `variance: fixed` does not train is dropped (as SiT does).
        """
        output = output.to(x.dtype)
        if output.shape[1] != 2 * x.shape[1]:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance if self.config.variance == "learned_range" else None

    def clean(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates (x0_hat, eps_hat) from a raw output at (x (B, C, H, W), t (B,))."""
        prediction, _ = self.split(output, x)
        alpha, sigma = self._coefficients(t, x)
        if self.config.prediction == "eps":
            return (x - sigma * prediction) / alpha, prediction
        if self.config.prediction == "flow":
            total = alpha + sigma
            return (x - sigma * prediction) / total, (x + alpha * prediction) / total
        power = alpha**2 + sigma**2
        return (
            (alpha * x - sigma * prediction) / power,
            (sigma * x + alpha * prediction) / power,
        )

    def losses(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        eps: Tensor | Noise,
        t: Tensor,
        condition: dict[str, Any],
    ) -> Tensor:
        """Weighted squared error of each sample, (B,) float32, and a learned variance's bound.

        Args:
            denoiser: called once, at the noisy x.
            x0: (B, C, H, W) clean latents, scaled to unit variance.
            eps: (B, C, H, W) standard normal noise, or where it comes from: then noising, loss and
                gradient are one pass each (`kernels.noising`).
            t: (B,) times from `times`.
            condition: handed to the denoiser.
        """
        if isinstance(eps, Noise):
            return self._losses_by_position(denoiser, x0, eps, t, condition)
        x0, eps = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (x0, eps))
        x = self.noise(x0, eps, t)
        prediction, variance = self.split(denoiser(x, t, condition), x)
        losses = (prediction - self.target(x0, eps, t)).square().flatten(1).mean(1)
        weight = self.weight(*self.schedule.coefficients(t))
        losses = losses if weight is None else weight * losses
        if self.config.variance == "fixed":
            return losses
        if variance is None:
            raise UserError(NO_VARIANCE)
        return losses + self._bound(x0, x, t, prediction.detach(), variance)

    def _losses_by_position(
        self, denoiser: Denoiser, x0: Tensor, noise: Noise, t: Tensor, condition: dict[str, Any]
    ) -> Tensor:
        alpha, sigma = self.schedule.coefficients(t)
        drawn = (x0, noise.positions, alpha, sigma)
        key = {"seed": noise.seed, "stream": noise.stream}
        wide = torch.promote_types(x0.dtype, torch.float32)
        output = denoiser(diffuse(*drawn, **key, dtype=wide), t, condition)
        bound = None
        if self.config.variance == "learned_range":
            if output.shape[1] != 2 * x0.shape[1]:
                raise UserError(NO_VARIANCE)
            bound = self._bound_rows(t)
        return diffusion_loss(
            output,
            *drawn,
            **key,
            target=self.config.prediction,
            weight=self.weight(alpha, sigma),
            bound=bound,
        )

    def _bound_rows(self, t: Tensor) -> Tensor:
        """The bound's numbers of `diffusion_loss` at times t (B,): (B, 4) float64."""
        alpha, sigma = self.schedule.coefficients(t.double())
        index = self.schedule.index(t)
        step = self.schedule.posterior(index)
        smallest = self.schedule.posterior(index.clamp(min=1)).variance
        first = (index == 0).to(alpha.dtype)
        logs = smallest.log(), step.largest.log()
        return torch.stack((step.from_x0 * sigma / alpha, *logs, first), dim=1)

    def _bound(
        self, x0: Tensor, x: Tensor, t: Tensor, prediction: Tensor, variance: Tensor
    ) -> Tensor:
        """One term of the variational bound in bits per dimension, (B,), its mean held fixed.

        As the published DiT trains its variances (Nichol and Dhariwal 2021): the divergence of the
        predicted from the true posterior, and at the first entry the likelihood of 8-bit levels.
        """
        shape = (-1, *[1] * (x.ndim - 1))
        index = self.schedule.index(t)
        step = self.schedule.posterior(index).view(shape)
        # The first step's own variance is zero, so its smallest value is the second entry's.
        smallest = self.schedule.posterior(index.clamp(min=1)).variance.view(shape).to(x.dtype)
        log_true = smallest.log()
        log_hat = learned_log_variance(variance, smallest, step.largest.to(x.dtype))
        x0_hat, _ = self.clean(prediction, x, t)
        mean, mean_hat = step.mean(x0, x), step.mean(x0_hat, x)
        divergence = 0.5 * (
            (log_hat - log_true - 1.0 + torch.exp(log_true - log_hat))
            + (mean - mean_hat).square() * torch.exp(-log_hat)
        )
        likelihood = -_log_likelihood_of_levels(x0, mean_hat, 0.5 * log_hat)
        term = torch.where((index == 0).view(shape), likelihood, divergence)
        return term.flatten(1).mean(1) / math.log(2.0)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.coefficients(t)
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.view(shape), sigma.view(shape)


def learned_log_variance(output: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
    """log sigma^2 between its two bounds, for a network's second half; -1 is the smallest."""
    fraction = 0.5 * (output + 1.0)
    return fraction * largest.log() + (1.0 - fraction) * smallest.log()


def _log_likelihood_of_levels(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the 8-bit level around x in [-1, 1] under a normal; open at the ends."""
    upper = _normal_cdf((x + 1.0 / 255.0 - mean) * torch.exp(-log_std))
    lower = _normal_cdf((x - 1.0 / 255.0 - mean) * torch.exp(-log_std))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the published losses use."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
