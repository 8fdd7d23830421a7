"""When a practising learner asks for more pictures, and how fast it learns meanwhile.

Called by course.py. The rule is Algorithm 1 of "Improving the Scaling Laws of Synthetic Data with
Deliberate Practice" (arXiv 2502.15588): every tau steps the monitor accuracy is measured; a strict
improvement sets the waiting count T to zero, anything else adds one; T >= Tmax asks for a round,
and adding it sets T to zero, while the best accuracy stays. The learning rate is
warm-up-stable-decay (MiniCPM, arXiv 2404.06395) by step: a linear rise, a constant middle, a
cosine fall. Rounds are added before the fall begins and never after.
"""

import math
from dataclasses import dataclass
from typing import Literal

from etude.core.config import Config, option


class ScheduleConfig(Config):
    """Warm-up, stable phase and cool-down, as shares of the steps of an arm."""

    steps: int = option(..., "optimizer steps of every arm", unit="steps", gt=0)
    warmup_share: float = option(0.1, "share of the steps with a rising rate", ge=0, lt=1)
    cooldown_share: float = option(0.2, "share of the steps with a falling rate", ge=0, lt=1)

    @property
    def warmup_steps(self) -> int:
        """Length of the linear rise."""
        return round(self.steps * self.warmup_share)

    @property
    def cooldown_steps(self) -> int:
        """Length of the cosine fall, during which nothing is added."""
        return round(self.steps * self.cooldown_share)

    @property
    def cooldown_start(self) -> int:
        """The first step of the fall when it begins neither early nor late."""
        return self.steps - self.cooldown_steps

    def end(self, cooldown_at: int | None = None) -> int:
        """Steps in all, where the fall begins at `cooldown_at` instead of where it should."""
        return self.steps if cooldown_at is None else cooldown_at + self.cooldown_steps

    def rate(self, step: int, cooldown_at: int | None = None) -> float:
        """Multiplier of the peak rate for step `step` in [0, end), in (0, 1]."""
        start = self.cooldown_start if cooldown_at is None else cooldown_at
        if step >= start:
            fall = (step - start) / self.cooldown_steps
            return self._rise(start) * 0.5 * (1.0 + math.cos(math.pi * fall))
        return self._rise(step)

    def _rise(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def may_add(self, visible_at: int) -> bool:
        """Whether a round may become visible after so many steps: a constant step is left."""
        return visible_at < self.cooldown_start


class TriggerConfig(Config):
    """The plateau rule. The paper gives no growth rule; ours are Tmax = patience + growth k and
    Tmax = patience ((N + kP) / N)^growth after k rounds."""

    evaluate_every: int = option(
        ..., "steps between two looks at the monitor split (tau)", unit="steps", gt=0
    )
    patience: float = option(1.0, "looks without improvement before the first round (T0)", gt=0)
    patience_growth: float = option(0.1, "how the patience grows with the rounds", ge=0)
    growth: Literal["linear", "power"] = option(
        "linear",
        "linear: patience_growth is added by every round; power: it is the exponent of the pool's"
        " size over the first one",
    )
    min_delta: float = option(
        0.0, "an accuracy counts as better only above best + this; in [0, 1]", ge=0, lt=1
    )
    reset_best: bool = option(
        False, "a round also forgets the best accuracy; the paper's algorithm keeps it"
    )
    weights: Literal["raw", "ema"] = option(
        "ema", "which weights of the learner are measured, guide the pictures and are reported"
    )
    delay_steps: int = option(
        0,
        "steps that the learner goes on before a round must be there; generator and learner work"
        " at once where placement is separate",
        unit="steps",
        ge=0,
    )


@dataclass
class Plateau:
    """The rule's state: best accuracy so far, looks waited since, rounds asked for."""

    best: float = -1.0
    waited: int = 0
    rounds: int = 0

    def patience(self, config: TriggerConfig, grown: float = 1.0) -> float:
        """Tmax after the rounds so far; `grown` is the pool's size over its first size."""
        if config.growth == "power":
            return config.patience * grown**config.patience_growth
        return config.patience + config.patience_growth * self.rounds

    def observe(self, accuracy: float, config: TriggerConfig, grown: float = 1.0) -> bool:
        """Count one look at the monitor; True when the learner has waited Tmax looks in vain."""
        if accuracy > self.best + config.min_delta or self.best < 0:
            self.best, self.waited = accuracy, 0
        else:
            self.waited += 1
        return self.waited >= self.patience(config, grown)

    def add_round(self, config: TriggerConfig) -> None:
        """A round is added: the count starts again."""
        self.rounds += 1
        self.waited = 0
        if config.reset_best:
            self.best = -1.0
