"""The recipe of deliberate practice: what `etude practice` is told; run by rounds.py."""

from typing import Any, Literal, Self

from pydantic import NonNegativeInt, model_validator

from etude.core.config import Config, option
from etude.core.recipe import Recipe
from etude.core.strategy import StrategyConfig
from etude.diffusion.guidance import GuidanceConfig
from etude.diffusion.samplers import SamplerConfig

from .learner import LearnerConfig
from .pictures import PicturesConfig
from .pruning import PruneConfig
from .trigger import ScheduleConfig, TriggerConfig

ArmKind = Literal["real", "mixed", "static", "omega0", "practice", "frozen", "prune", "branch"]
# Arms that copy what the practice arm did, and so come after it.
FOLLOWERS = ("mixed", "static", "omega0", "frozen", "prune", "branch")


class ArmConfig(Config):
    """One way of training the learner. In a list of arms its kind alone may stand for it.

    practice   rounds of guided pictures at plateaus (Algorithm 1)
    omega0     the practice arm's rounds at the same steps, unguided
    frozen     the same, guided by the learner of the first round
    prune      the same, unguided, of which a score chooses the pictures
    static     the practice arm's final number of pictures, unguided, all from the start
    real       the real training pictures
    mixed      both of the last two
    branch     the practice arm from each of its rounds on, without adding that round
    """

    kind: ArmKind = option(..., "what the learner learns from")
    name: str = option(
        "",
        "what it and its folder are called; empty takes the kind, and a prune arm's score",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9_+-]*)?$",
    )
    equal: Literal["samples", "compute"] = option(
        "samples",
        "what static and prune have as much of as practice: samples, or drawing (evaluations of the"
        " denoiser, a backward pass counting as two)",
    )
    real_share: float | None = option(
        None, "mixed: share of real pictures in a batch; 0.5 unless given", gt=0, lt=1
    )
    prune: PruneConfig | None = option(None, "prune: which pictures are chosen")
    rounds: list[NonNegativeInt] | None = option(
        None, "branch: which rounds of the practice arm, from 0; all unless given"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        owners = {"real_share": "mixed", "prune": "prune", "rounds": "branch"}
        for field, kind in owners.items():
            if getattr(self, field) is not None and self.kind != kind:
                raise ValueError(f"{field} has no effect on an arm of kind {self.kind}: remove it")
        if self.kind == "practice" and self.name:
            raise ValueError("the practice arm is called practice: remove its name")
        if self.name and (self.kind == "branch") != self.name.startswith("branch"):
            raise ValueError(f"name {self.name}: branches, and they alone, are called branch...")
        if self.kind == "prune" and self.prune is None:
            raise ValueError("an arm of kind prune needs prune, such as prune: {score: entropy}")
        if self.equal == "compute" and self.kind not in ("static", "prune"):
            raise ValueError(f"equal has no effect on an arm of kind {self.kind}: remove it")
        if (
            self.equal == "compute"
            and self.prune is not None
            and self.prune.differs("oversampling")
        ):
            raise ValueError(
                "equal: compute says how many pictures are drawn: remove prune.oversampling"
            )
        return self

    @property
    def title(self) -> str:
        """What the arm is called in tables and folders."""
        if self.name:
            return self.name
        parts = [self.kind]
        if self.prune is not None:
            parts += [self.prune.score] + (["easy"] if self.prune.keep == "easy" else [])
        return "-".join(parts + (["compute"] if self.equal == "compute" else []))


class PracticeRecipe(Recipe):
    """A learner, a generator, and when the one asks the other for pictures."""

    kind: Literal["practice"]
    generator: str = option(
        "", "a latent-diffusion run, or a published checkpoint's folder; needed to run"
    )
    weights: str = option(
        "",
        "its weights: raw or ema:<decay>, by default its longest average; of a Stable Diffusion"
        " folder what it computes in, such as bfloat16",
    )
    classes: str = option(
        "",
        "file of the classes in index order, one a line: what picture folders are read by, and what"
        " a generator asked by text is asked for; empty takes the splits' own",
    )
    whole_classes: str = option(
        "",
        "file of the classes that `classes` are part of, for test sets that number those"
        " (ImageNet-V2)",
    )
    prompt: str = option("{name}", "a generator asked by text: what it is asked for a class")
    sampler: SamplerConfig = option(..., "how pictures are drawn")
    pictures: PicturesConfig = option(..., "size, crop and channels of the real splits")
    monitor: str = option("", "real pictures that decide when to add pictures; needed to run")
    test: str = option(
        "", "real pictures that accuracies are reported on, used once; needed to run"
    )
    tests: dict[str, str] = option({}, "further test sets by name, reported beside it")
    real_train: str = option("", "real pictures that the arms `real` and `mixed` learn from")
    judge: str = option(
        "", "a judge's run, or its folder: estimates how many pictures lost their class"
    )
    learner: LearnerConfig = option(LearnerConfig(), "the classifier and its optimizer")
    strategy: StrategyConfig = option(
        StrategyConfig(kind="local"), "how the learner is spread over processes"
    )
    schedule: ScheduleConfig = option(..., "length and learning rate of every arm")
    trigger: TriggerConfig = option(..., "when the practice arm adds a round")
    guidance: GuidanceConfig = option(GuidanceConfig(), "how a round's pictures are made harder")
    start_samples: int = option(..., "pictures before the first step (N)", unit="pictures", gt=0)
    round_samples: int = option(..., "pictures added by a round (P)", unit="pictures", gt=0)
    max_rounds: int = option(0, "rounds at most; 0 means no limit", unit="rounds", ge=0)
    max_samples: int = option(0, "pictures at most; 0 means no limit", unit="pictures", ge=0)
    max_evaluations: int = option(
        0,
        "once drawing for the practice arm has taken so much, no round is asked for; 0: no limit",
        unit="evaluations of the denoiser, a backward pass counting as two",
        ge=0,
    )
    at_limit: Literal["learn", "cool_down"] = option(
        "learn",
        "when no round may follow: learn to the end of the schedule, or let the cool-down begin at"
        " the next plateau and end early",
    )
    newest_weight: float = option(
        1.0, "how often a picture of the newest round is drawn from the pool, over any other", gt=0
    )
    arms: list[ArmConfig] = option(
        [ArmConfig(kind="real"), ArmConfig(kind="practice"), ArmConfig(kind="static")],
        "what is trained, in this order",
    )
    branch_from: str = option(
        "", "a run whose practice arm is taken instead of one of this run: for branches"
    )
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
    placement: Literal["interleaved", "separate"] = option(
        "interleaved",
        "interleaved: every process learns and draws in turn; separate: some draw, others learn",
        affects_result=False,
    )
    generators: int = option(
        1,
        "processes that draw where placement is separate, the last ones of the job",
        unit="processes",
        gt=0,
        affects_result=False,
    )
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
        if self.pictures.channels != self.learner.model.in_channels:
            raise ValueError(
                f"pictures.channels={self.pictures.channels} but learner.model.in_channels="
                f"{self.learner.model.in_channels}: make them equal"
            )
        if self.placement == "interleaved" and self.differs("generators"):
            raise ValueError("generators has no effect with placement interleaved: remove it")
        if self.placement == "separate" and self.strategy.kind == "zero":
            raise ValueError(
                "DeepSpeed takes all processes of a job, and with placement separate some only"
                " draw: set strategy.kind=local"
            )
        if self.whole_classes and not self.classes:
            raise ValueError("whole_classes has no effect without classes: name its part there")
        self._check_arms()
        return self

    def _check_arms(self) -> None:
        titles = [arm.title for arm in self.arms]
        if len(set(titles)) != len(titles) or not titles:
            raise ValueError(
                f"arms {', '.join(titles) or 'are empty'}: give at least one, each a name"
                " of its own (name: ...)"
            )
        kinds = [arm.kind for arm in self.arms]
        if kinds.count("practice") > 1:
            raise ValueError("arms holds practice twice: what the other arms copy must be one arm")
        for place, arm in enumerate(self.arms):
            if arm.kind in FOLLOWERS and "practice" not in kinds[:place] and not self.branch_from:
                raise ValueError(
                    f"arm {arm.title} copies the practice arm: list practice before it"
                )
        if self.at_limit == "cool_down" and "practice" in kinds[1:]:
            raise ValueError(
                "at_limit=cool_down may end the practice arm early, and the others with it: list"
                " practice first"
            )
        if "test" in self.tests:
            raise ValueError("tests holds a set called test, which `test` is: give it another name")
        if self.branch_from and set(kinds) != {"branch"}:
            raise ValueError("branch_from is for arms of kind branch alone: set arms=[branch]")
        if ({"real", "mixed"} & set(kinds) != set()) != bool(self.real_train):
            raise ValueError(
                "the arms real and mixed need real_train, which has no other use: give both or"
                " neither"
            )

    def size(self, rounds: int) -> int:
        """Pictures in the pool after so many rounds: N + kP."""
        return self.start_samples + rounds * self.round_samples

    def room_for(self, rounds: int) -> bool:
        """Whether a round more keeps to the numbers of rounds and of pictures."""
        return (not self.max_rounds or rounds < self.max_rounds) and (
            not self.max_samples or self.size(rounds + 1) <= self.max_samples
        )

    def may_add(self, rounds: int, steps_done: int) -> bool:
        """Whether one more round fits the limits and the schedule."""
        in_time = self.schedule.may_add(steps_done + self.trigger.delay_steps)
        return in_time and self.room_for(rounds)
