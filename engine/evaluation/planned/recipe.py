"""The recipe of a plan, `kind: plan`: what is compared, on what, by which figures.

    models: {small: {source: ldm-digits-small}, large: {source: ldm-digits-large, checkpoints: all}}
    guidance: [1.0, 2.0]
    data_sets: {digits: {kind: shards, folder: data/digits/test}}
    metrics: [frechet@classifier, prdc@classifier]
    extractors: {classifier: {weights: JUDGE_RUN}}

`etude evaluate PLAN.yaml` runs it; running.py says in what order.
"""

from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.recipe import Recipe
from etude.metrics.alignment import SCORERS
from etude.metrics.intervals import IntervalConfig
from etude.metrics.registry import METRICS, Metric, NoOptions, open_metric

Precision = Literal["float32", "tf32", "bfloat16", "float16"]


class ModelConfig(Config):
    """One model of a plan, or a folder of pictures that somebody drew."""

    source: str = option(
        ..., "run (folder or name), published or Stable Diffusion folder, or folder of pictures"
    )
    kind: str = option(
        "run", "who draws: run; pictures for a folder that holds them; or a name from `files`"
    )
    checkpoints: Literal["last", "all"] | tuple[int, ...] = option(
        "last", "which checkpoints of a run: last, all, or images seen", unit="images"
    )
    weights: str = option("", "profile, such as ema:0.9999; by default the longest average")
    training_seed: int | None = option(
        None, "seed of its training, where runs of several seeds stand for one model"
    )
    counts_as: str = option("", "the model that this run of another training seed belongs to")
    options: dict[str, Any] = option({}, "for who draws; of a run, fields of its sampler")


class DataSetConfig(Config):
    """One data set of a plan."""

    kind: str = option(..., "its registered name: coco, geode, emoji, folder, shards, ...")
    folder: str = option("", "where its files lie")
    real: int = option(0, "real pictures taken, spread over all; 0: all", unit="images", ge=0)
    prompts: int = option(0, "prompts taken, spread over all; 0: all", ge=0)
    options: dict[str, Any] = option({}, "of the data set, such as {year: 2017}")


class FeaturesConfig(Config):
    """Where an extractor's weights are and how they compute."""

    weights: str = option("", "file or folder of its weights")
    dtype: Precision = option("float32", "what its network computes in")
    compile: bool = option(False, "whether torch.compile builds it")
    options: dict[str, Any] = option({}, "of the extractor, such as {resize: clean}")


class MetricConfig(Config):
    """A metric with options of its own."""

    metric: str = option(..., "name, or name@features: prdc@dinov2")
    options: dict[str, Any] = option({}, "of the metric, such as {k: 3}")


class ScreenConfig(Config):
    """A first look with few pictures, after which only the best go on."""

    samples: int = option(..., "pictures of each candidate", unit="images", ge=2)
    metrics: tuple[str, ...] = option(
        ..., "one figure keeps the best by it, several keep their front", min_length=1, max_length=3
    )
    keep: int = option(3, "candidates that go on by one figure; a front goes on as it is", ge=1)
    seed: int = option(1_000_003, "names its pictures, which enter no reported figure", ge=0)


class PlanRecipe(Recipe):
    """Compare models, checkpoints and guidance on data sets, by figures with intervals."""

    kind: Literal["plan"] = option("plan", "which job this is")
    models: dict[str, ModelConfig] = option(..., "by the name that the table shows", min_length=1)
    guidance: tuple[float, ...] = option(
        (), "scales that every model draws with; by default its own"
    )
    data_sets: dict[str, DataSetConfig] = option(
        ..., "by the name that the table shows", min_length=1
    )
    metrics: tuple[str | MetricConfig, ...] = option(..., "what is measured", min_length=1)
    extractors: dict[str, FeaturesConfig] = option({}, "by name; inception, clip, ...")
    samples: int = option(1000, "pictures of each candidate and data set", unit="images", ge=2)
    image_size: int = option(
        0, "side that real pictures are brought to; 0: as stored", unit="pixels", ge=0
    )
    fit: Literal["crop", "squash"] = option("crop", "how they are brought to it")
    channels: Literal[1, 3] = option(3, "of all pictures")
    screen: ScreenConfig | None = option(None, "a first look that promotes the best")
    interval: IntervalConfig = option(IntervalConfig(), "of every figure")
    by_group: bool = option(True, "whether every group of a data set has its own figures too")
    shown: int = option(
        8, "prompts whose pictures stand side by side", affects_result=False, ge=0, le=64
    )
    watch_minutes: float | None = option(
        None,
        "go on with checkpoints that appear, until none did for so long; null: not",
        unit="minutes",
        affects_result=False,
        gt=0,
    )
    files: tuple[str, ...] = option((), "Python files that register things of your own")
    store: str = option("runs/features", "folder of the feature store", affects_result=False)
    table: str = option(
        "", "folder of the table; several plans may share one; by default the run's own"
    )
    batch_size: int = option(64, "pictures per forward", unit="images", ge=1)
    device: str = option("auto", "auto, cpu or cuda", affects_result=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.guidance)) != len(self.guidance):
            raise ValueError(f"guidance {list(self.guidance)} names a scale twice")
        for name, model in self.models.items():
            drawn = model.kind != "pictures"
            if not drawn and (model.checkpoints != "last" or model.weights or model.options):
                raise ValueError(
                    f"models.{name} is a folder of pictures: checkpoints, weights and options have"
                    " no effect; leave them out"
                )
            if model.counts_as and model.training_seed is None:
                raise ValueError(f"models.{name}.counts_as has no effect without training_seed")
        places = [(m.counts_as or name, m.training_seed) for name, m in self.models.items()]
        twice = next((one for one in places if places.count(one) > 1), None)
        if twice is not None:
            raise ValueError(
                f"two runs count as model {twice[0]} with training_seed {twice[1]}; give each its"
                " own"
            )
        if self.screen is not None:
            folders = [name for name, model in self.models.items() if model.kind == "pictures"]
            if folders:
                raise ValueError(
                    f"models.{folders[0]} is a folder of pictures, which would both choose and be"
                    " reported; leave it or screen out"
                )
            known = METRICS.names()
            metric = next((m for m in self.screen.metrics if m.split("@")[0] in known), "")
            if metric:
                raise ValueError(
                    f"screen.metrics has {metric}, which is a metric: name the figure that it makes"
                    " as the table shows it, such as 'FID' or 'kernel distance (pixels features)'"
                )
            if self.screen.seed == self.seed:
                raise ValueError("screen.seed is seed; pictures that choose must be other ones")
        asked = [m if isinstance(m, str) else m.metric for m in self.metrics]
        same: dict[str, list[str]] = {}
        for spec in asked:
            same.setdefault(_with_features(spec), []).append(spec)
        double = next((specs for specs in same.values() if len(specs) > 1), None)
        if double is not None:
            raise ValueError(
                f"metrics names {' and '.join(double)}, whose figures would have one name; make two"
                " plans"
            )
        if all(model.kind == "pictures" for model in self.models.values()):
            if self.guidance:
                raise ValueError("guidance has no effect on folders of pictures; leave it out")
            if self.watch_minutes is not None:
                raise ValueError(
                    "watch_minutes: folders of pictures get no checkpoints; leave it out"
                )
        return self


def _with_features(spec: str) -> str:
    """ "kid@inception" of "kid", whose features those are where nobody says which."""
    known = "@" not in spec and spec in METRICS.names()
    return f"{spec}@{METRICS.get(spec).features}" if known else spec


def asked_metrics(recipe: PlanRecipe) -> list[MetricConfig]:
    """The plan's metrics in their order, each with its options."""
    return [MetricConfig(metric=m) if isinstance(m, str) else m for m in recipe.metrics]


def is_scorer(asked: MetricConfig) -> bool:
    """Whether a metric scores each picture by its prompt, rather than sets of features."""
    return asked.metric.partition("@")[0] in SCORERS.names()


def opened_metrics(recipe: PlanRecipe) -> list[tuple[Metric, str, Config]]:
    """(metric, features, options) of the plan's metrics of sets, in its order.

    Raises:
        UserError: there is no such metric, an option that it does not have, features that it cannot
            take, or too few pictures.
    """
    found = []
    for asked in asked_metrics(recipe):
        if is_scorer(asked):
            continue
        try:
            metric, features = open_metric(asked.metric)
        except UserError as error:
            raise UserError(f"{error}; or one of {', '.join(SCORERS.names())}") from None
        if asked.options and metric.options is NoOptions:
            raise UserError(f"metrics: {metric.name} has no options; leave them out")
        try:
            options = metric.options(**asked.options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (metric.name, *first["loc"])))
            if first["type"] == "extra_forbidden":
                there = ", ".join(metric.options.model_fields)
                raise UserError(f"metrics: {where}: no such option; it has {there}") from None
            said = first["msg"].removeprefix("Value error, ")
            raise UserError(f"metrics: {where}: {said}") from None
        least = metric.least(options, 1.0)
        if recipe.samples < least:
            raise UserError(
                f"metrics: {metric.name} needs {least} pictures and the plan draws"
                f" {recipe.samples}; set samples={least} or more"
            )
        metric.check(features)
        found.append((metric, features, options))
    return found
