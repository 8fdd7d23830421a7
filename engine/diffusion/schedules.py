"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 clean and t = 1 pure noise.

Called by `objectives.py` and `samplers.py`. Two families share one time axis:

- continuous: "flow" (alpha = 1 - t, sigma = t) and "cosine" (alpha = cos, sigma = sin of pi t / 2);
- tables of `steps` entries: "linear" (Ho et al. 2020), "scaled_linear" (linear in the root of
  beta, as latent diffusion and Stable Diffusion use under the name "linear") and "cosine_table"
  (Nichol and Dhariwal 2021, betas capped at 0.999; "squaredcos_cap_v2" elsewhere). Entry i lies at
  time t = i / steps, so a network that takes t * 1000 sees the published index of a 1000-step
  table.

`shift` divides the amplitude signal-to-noise ratio alpha / sigma by a constant, as larger pictures
need (Esser et al. 2024: for flow, t -> s t / (1 + (s - 1) t)).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScheduleName = Literal["flow", "cosine", "linear", "scaled_linear", "cosine_table"]
BETAS = {"linear": (1e-4, 2e-2), "scaled_linear": (0.00085, 0.012)}
TABLES = (*BETAS, "cosine_table")


@dataclass(frozen=True)
class Posterior:
    """q(x_s | x_t, x_0) of the step from time t to an earlier s; every field broadcasts against x.

    variance is that of the posterior; largest is that of x_t given x_s, its upper bound.
    """

    variance: Tensor
    largest: Tensor
    from_x0: Tensor
    from_x: Tensor

    def mean(self, x0: Tensor, x: Tensor) -> Tensor:
        """Mean for a clean x0 and the present x, both (B, ...), in x's dtype."""
        return self.from_x0.to(x.dtype) * x0 + self.from_x.to(x.dtype) * x

    def view(self, shape: tuple[int, ...]) -> "Posterior":
        """The same step with every field reshaped."""
        fields = (self.variance, self.largest, self.from_x0, self.from_x)
        return Posterior(*(field.view(shape) for field in fields))


def posterior(alpha: Tensor, sigma: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Posterior:
    """The step between two points of a schedule, all of one shape, preferably float64."""
    ratio = alpha / alpha_s
    largest = sigma**2 - ratio**2 * sigma_s**2
    return Posterior(
        variance=largest * (sigma_s / sigma) ** 2,
        largest=largest,
        from_x0=alpha_s * largest / sigma**2,
        from_x=ratio * (sigma_s / sigma) ** 2,
    )


class Schedule:
    """Coefficients of a schedule; float32, or float64 for float64 times."""

    def __init__(
        self,
        name: ScheduleName,
        *,
        steps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
        shift: float = 1.0,
    ) -> None:
        """
        Args:
            name: one of "flow", "cosine", "linear", "scaled_linear", "cosine_table".
            steps: entries of a table; unused by the continuous schedules.
            beta_start: first beta of a linear table; None: the published value of its name.
            beta_end: last beta of a linear table; None: the published value of its name.
            zero_terminal_snr: rescale a table so that its last entry is pure noise (Lin et al.
                2024, algorithm 1).
            shift: divides alpha / sigma; 1 leaves the schedule alone.
        """
        self.name = name
        self.steps = steps
        self.shift = shift
        self.discrete = name in TABLES
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        if self.discrete:
            beta = _betas(name, steps, beta_start, beta_end)
            self._alpha_bar = _alpha_bar(beta, zero_terminal_snr, shift)
        self.reaches_noise = not self.discrete or zero_terminal_snr

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the clean data at times t in [0, 1], same shape."""
        return self.coefficients(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at times t in [0, 1], same shape."""
        return self.coefficients(t)[1]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t); a table is read at the entry nearest to t."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        if self.discrete:
            alpha, sigma = self._table(t.device, t.dtype)
            index = self.index(t)
            return alpha[index], sigma[index]
        if self.name == "flow":
            return 1.0 - t, t
        # The sine of the complement is exact where the cosine goes through zero, at t = 1.
        return torch.sin(0.5 * math.pi * (1.0 - t)), torch.sin(0.5 * math.pi * t)

    def index(self, t: Tensor) -> Tensor:
        """Table entry nearest to times t in [0, 1], int64."""
        return (t * self.steps).round().long().clamp(0, self.steps - 1)

    def snap(self, t: Tensor) -> Tensor:
        """Uniform times t in [0, 1) to times of this schedule: shifted, or the entry t falls in."""
        if self.discrete:
            return (t * self.steps).floor().clamp(0, self.steps - 1) / self.steps
        return self.shifted(t, self.shift)

    def shifted(self, t: Tensor, shift: float) -> Tensor:
        """Times of a continuous schedule at which alpha / sigma is that of t, divided by shift."""
        if shift == 1.0:
            return t
        if self.name == "flow":
            return shift * t / (1.0 + (shift - 1.0) * t)
        angle = 0.5 * math.pi * t
        return torch.atan2(shift * torch.sin(angle), torch.cos(angle)) / (0.5 * math.pi)

    def posterior(self, index: Tensor) -> Posterior:
        """The steps from table entries `index` (B,) to the entries before them; 0 steps to clean.

        Computed in float64: neighbouring entries differ by less than float32 resolves.
        """
        alpha, sigma = self._table(index.device, torch.float64)
        before, first = (index - 1).clamp(min=0), index == 0
        return posterior(
            alpha[index],
            sigma[index],
            alpha[before].masked_fill(first, 1.0),
            sigma[before].masked_fill(first, 0.0),
        )

    def _table(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (device, dtype)
        if key not in self._tables:
            alpha = self._alpha_bar.sqrt().to(device, dtype)
            sigma = (1.0 - self._alpha_bar).sqrt().to(device, dtype)
            self._tables[key] = alpha, sigma
        return self._tables[key]


def _betas(name: str, steps: int, first: float | None, last: float | None) -> Tensor:
    """What every entry of a table adds of noise, (steps,) float64."""
    if name == "cosine_table":
        t = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
        bar = torch.cos(0.5 * math.pi * (t + 0.008) / 1.008) ** 2
        return (1.0 - bar[1:] / bar[:-1]).clamp(max=0.999)
    first = BETAS[name][0] if first is None else first
    last = BETAS[name][1] if last is None else last
    if name == "linear":
        return torch.linspace(first, last, steps, dtype=torch.float64)
    return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2


def _alpha_bar(beta: Tensor, zero_terminal_snr: bool, shift: float) -> Tensor:
    """Squared signal scale of every entry, (steps,) float64."""
    alpha_bar = torch.cumprod(1.0 - beta, dim=0)
    if zero_terminal_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return alpha_bar / (alpha_bar + shift**2 * (1.0 - alpha_bar))
