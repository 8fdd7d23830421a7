"""When a practising learner asks for more pictures, and how fast it learns meanwhile.

Called by rounds.py. The rule is Algorithm 1 of "Improving the Scaling Laws of Synthetic Data with
Deliberate Practice" (arXiv 2502.15588): every tau steps the monitor accuracy is measured; a strict
improvement sets the waiting count T to zero, anything else adds one; T >= Tmax asks for a round,
and adding it sets T to zero, while the best accuracy stays. The learning rate is
warm-up-stable-decay (MiniCPM, arXiv 2404.06395) by step: a linear rise, a constant middle, a
cosine fall. Rounds are
added before the fall begins and never after.
"""

import math
from dataclasses import asdict, dataclass
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
    def cooldown_start(self) -> int:
        """The first step of the cosine fall; from here on nothing is added."""
        return self.steps - round(self.steps * self.cooldown_share)

    def rate(self, step: int) -> float:
        """Multiplier of the peak rate for step `step` in [0, steps), in (0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < self.cooldown_start:
            return 1.0
        fall = (step - self.cooldown_start) / (self.steps - self.cooldown_start)
        return 0.5 * (1.0 + math.cos(math.pi * fall))

    def may_add(self, steps_done: int) -> bool:
        """Whether a round may be added after `steps_done` steps: some constant step is left."""
        return steps_done < self.cooldown_start


class TriggerConfig(Config):
    """The plateau rule. The paper gives no growth rule; ours is Tmax = patience + growth * k."""

    evaluate_every: int = option(
        ..., "steps between two looks at the monitor split (tau)", unit="steps", gt=0
    )
    patience: float = option(1.0, "looks without improvement before the first round (T0)", gt=0)
    patience_growth: float = option(0.1, "looks added to the patience by every round", ge=0)
    min_delta: float = option(
        0.0, "an accuracy counts as better only above best + this; in [0, 1]", ge=0, lt=1
    )
    weights: Literal["raw", "ema"] = option(
        "ema", "which weights of the learner are measured, guide the pictures and are reported"
    )


@dataclass
class Plateau:
    """The rule's state: best accuracy so far, looks waited since, rounds asked for."""

    best: float = -1.0
    waited: int = 0
    rounds: int = 0

    def patience(self, config: TriggerConfig) -> float:
        """Tmax after the rounds so far."""
        return config.patience + config.patience_growth * self.rounds

    def observe(self, accuracy: float, config: TriggerConfig) -> bool:
        """Count one look at the monitor; True when the learner has waited Tmax looks in vain."""
        if accuracy > self.best + config.min_delta or self.best < 0:
            self.best, self.waited = accuracy, 0
        else:
            self.waited += 1
        return self.waited >= self.patience(config)

    def add_round(self) -> None:
        """A round is added: the count starts again, the best accuracy stays."""
        self.rounds += 1
        self.waited = 0

    def to_dict(self) -> dict:
        """For the saved state; `Plateau(**d)` reads it."""
        return asdict(self)
