"""The recipe of deliberate practice: what `etude practice` is told; run by rounds.py."""

from typing import Literal, Self

from pydantic import model_validator

from etude.core.config import option
from etude.core.recipe import Recipe
from etude.data.augment import AugmentConfig
from etude.diffusion.guidance import GuidanceConfig
from etude.diffusion.samplers import SamplerConfig

from .learner import LearnerConfig
from .trigger import ScheduleConfig, TriggerConfig

ArmName = Literal["practice", "static", "omega0", "real"]


class PracticeRecipe(Recipe):
    """A learner, a generator, and when the one asks the other for pictures."""

    kind: Literal["practice"]
    generator: str = option("", "a latent-diffusion run that draws the pictures; needed to run")
    weights: str = option("", "its weights: raw or ema:<decay>; empty takes its longest average")
    sampler: SamplerConfig = option(..., "how pictures are drawn")
    pictures: AugmentConfig = option(..., "size, crop and channels of the real splits")
    monitor: str = option(..., "real shards that decide when to add pictures")
    test: str = option(..., "real shards that accuracies are reported on, used once")
    real_train: str = option("", "real shards that the arm `real` learns from")
    learner: LearnerConfig = option(LearnerConfig(), "the classifier and its optimizer")
    schedule: ScheduleConfig = option(..., "length and learning rate of every arm")
    trigger: TriggerConfig = option(..., "when the practice arm adds a round")
    guidance: GuidanceConfig = option(GuidanceConfig(), "how a round's pictures are made harder")
    start_samples: int = option(..., "pictures before the first step (N)", unit="pictures", gt=0)
    round_samples: int = option(..., "pictures added by a round (P)", unit="pictures", gt=0)
    max_rounds: int = option(0, "rounds at most; 0 means no limit", unit="rounds", ge=0)
    max_samples: int = option(0, "pictures at most; 0 means no limit", unit="pictures", ge=0)
    arms: list[ArmName] = option(["practice", "static", "real"], "what is trained, in this order")
    duplicate_distance: float = option(
        2.0,
        "refuse test pictures this close (root mean square of 255 levels) to the generator's",
        ge=0,
    )
    probe_samples: int = option(
        64,
        "new pictures of a round drawn again without guidance, for comparison",
        unit="pictures",
        ge=0,
        affects_result=False,
    )
    chunk: int = option(256, "pictures drawn and stored at a time", unit="pictures", gt=0)
    save_every: int = option(
        500, "steps between two checkpoints", unit="steps", gt=0, affects_result=False
    )
    max_minutes: float | None = option(
        None, "save and stop after this time", unit="minutes", gt=0, affects_result=False
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        classes = self.learner.model.num_classes
        for name in ("start_samples", "round_samples"):
            if getattr(self, name) % classes:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of learner.model.num_classes="
                    f"{classes}: rounds hold equally many pictures of each class"
                )
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise ValueError("arms must name at least one arm, each once")
        for later in ("static", "omega0"):
            if later in self.arms and "practice" not in self.arms[: self.arms.index(later)]:
                raise ValueError(f"arm {later} copies the practice arm: list practice before it")
        if ("real" in self.arms) != bool(self.real_train):
            raise ValueError("arm real and real_train go together: give both or neither")
        if self.pictures.channels != self.learner.model.in_channels:
            raise ValueError(
                f"pictures.channels={self.pictures.channels} but learner.model.in_channels="
                f"{self.learner.model.in_channels}: make them equal"
            )
        return self

    def size(self, rounds: int) -> int:
        """Pictures in the pool after so many rounds: N + kP."""
        return self.start_samples + rounds * self.round_samples

    def may_add(self, rounds: int, steps_done: int) -> bool:
        """Whether one more round fits the limits and the schedule."""
        return (
            self.schedule.may_add(steps_done)
            and (not self.max_rounds or rounds < self.max_rounds)
            and (not self.max_samples or self.size(rounds + 1) <= self.max_samples)
        )
