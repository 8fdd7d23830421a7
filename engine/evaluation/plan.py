"""The recipes and jobs of evaluation: what is extracted, what is measured, what is reported.

`extract` fills the store, `evaluate` also turns features into figures: each with an interval, the
same figure of real pictures against other real pictures, and the protocol that fixes it. Called by
the command line's `extract` and `evaluate` and by the demo, which hand in the generator.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import model_validator

from etude.core.config import Config, option
from etude.core.distributed import World, on_first
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import Recipe
from etude.core.rng import Stream, permute
from etude.core.run import Run
from etude.diffusion.samplers import SamplerConfig
from etude.metrics import registry
from etude.metrics.extractors import Extractor, load_extractor
from etude.metrics.figures import measure
from etude.metrics.intervals import (
    Interval,
    IntervalConfig,
    halves,
    interval,
    proportion,
)
from etude.metrics.memorisation import label_agreement, nearest_pictures
from etude.metrics.prdc import PrdcOptions
from etude.metrics.registry import METRICS, Pair
from etude.metrics.shortages import shortages
from etude.metrics.store import FeatureSet, FeatureStore

from .extract import device_for, extract_set, feature_key
from .judge import as_judged
from .picture_set import spread
from .protocol import NOT_STATED, Protocol, stated
from .report import result_table
from .sets import (
    FIT,
    GeneratedPictures,
    Generator,
    PictureSet,
    ShardPictures,
    Stages,
    open_pictures,
)

FAMILIES = ("frechet", "kid", "prdc")
Metric = Literal["frechet", "kid", "prdc", "agreement", "memorisation"]


class ExtractorConfig(Config):
    """The frozen network whose features are compared."""

    kind: Literal["classifier", "inception"] = option("inception", "which network")
    weights: str = option(
        "", "classifier: its folder or the run that trained it; inception: the fetched file"
    )


class ExtractRecipe(Recipe):
    """Features of real and generated pictures into the store."""

    kind: Literal["extract"] = option("extract", "which job this is")
    real: str = option(..., "folder of real pictures (shards) that the generator never saw")
    train: str = option("", "folder of the generator's training pictures, for nearest pictures")
    generator: str = option("", "run that draws the pictures: its folder or name")
    weights: str = option("", "profile of that run, such as ema:0.9999; by default its longest")
    sampler: SamplerConfig | None = option(
        None, "how the generator draws; null: as its run's recipe says"
    )
    generated: str = option("", "folder of pictures (shards or files) in place of a generator")
    samples: int = option(1000, "pictures to draw", unit="images", ge=2)
    image_size: int = option(
        0, "side that stored pictures are brought to; 0: as stored", unit="pixels", ge=0
    )
    extractor: ExtractorConfig = option(ExtractorConfig(), "the features")
    judge: str = option("", "folder of the classifier that labels pictures; default: the extractor")
    metrics: tuple[Metric, ...] = option(("frechet", "prdc"), "what to measure", min_length=1)
    store: str = option("runs/features", "folder of the feature store", affects_result=False)
    batch_size: int = option(64, "pictures per forward", unit="images", ge=1)
    device: str = option("auto", "auto, cpu or cuda", affects_result=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.generator) and bool(self.generated):
            raise ValueError("generator and generated are both set; keep one")
        if self.sampler is not None and not self.generator:
            raise ValueError("sampler has no effect without a generator; set generator=RUN")
        if self.weights and not self.generator:
            raise ValueError("weights has no effect without a generator; set generator=RUN")
        if "memorisation" in self.metrics and not self.train:
            raise ValueError("memorisation needs the training pictures; set train=FOLDER")
        if "agreement" in self.metrics and not self.judge and self.extractor.kind != "classifier":
            raise ValueError("agreement needs a classifier; set judge=FOLDER")
        return self


class EvaluateRecipe(ExtractRecipe):
    """Figures of generated against real pictures, with protocol and intervals."""

    kind: Literal["evaluate"] = option("evaluate", "which job this is")
    k: int = option(5, "neighbours of precision, recall, density and coverage", ge=1)
    interval: IntervalConfig = option(IntervalConfig(), "the interval of every figure")
    real_against: Literal["halves", "train"] = option(
        "halves",
        "what real-against-real compares: two random halves of the real pictures, or them with the"
        " training pictures (biased where the extractor was trained on those)",
    )

    @model_validator(mode="after")
    def _check_real(self) -> Self:
        if self.real_against == "train" and not self.train:
            raise ValueError("real_against is train; set train=FOLDER")
        return self


@dataclass(frozen=True)
class Opened:
    """The sets and extractors of a recipe."""

    sets: dict[str, PictureSet]
    extractor: Extractor
    judge: Extractor | None
    pixels: Extractor | None
    store: FeatureStore

    def of(self, name: str) -> list[Extractor]:
        """Extractors that the set `name` goes through."""
        wanted = [self.extractor] if name != "train" else []
        if name == "generated" and self.judge is not None:
            wanted.append(self.judge)
        return wanted + ([self.pixels] if self.pixels is not None else [])

    def load(self, name: str, extractor: Extractor) -> FeatureSet:
        """A set's features from the store."""
        return self.store.load(feature_key(self.sets[name], extractor))


def extract(
    recipe: ExtractRecipe,
    run: Run,
    generator: Generator | None = None,
    log: Log | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Fill the store with what the recipe's metrics need.

    Args:
        generator: draws the pictures; needed when the recipe names one.
        world: processes that share the work, all of which call this; None: this one alone.

    Returns:
        Digest and count per set, images per second by stage, the extractor.
    """
    log = log or Log(run.folder, quiet=True)
    return _extract(recipe, _open(recipe, generator, world), log, world)


def evaluate(
    recipe: EvaluateRecipe,
    run: Run,
    generator: Generator | None = None,
    log: Log | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Extract, measure, and report a table.

    Args:
        generator: draws the pictures; needed when the recipe names one.
        world: processes that share the extracting, all of which call this; the first one measures.

    Returns:
        `protocol` with `protocol_fingerprint`, `figures` (name -> "generated", "matched", "real",
        each an interval as a dict), `labels` and `nearest` where asked for, `sets`, `counts` and
        images per second; plain values throughout, ready for result.json.
    """
    log = log or Log(run.folder, quiet=True)
    opened = _open(recipe, generator, world)
    if "generated" not in opened.sets:
        raise UserError("nothing to evaluate: set generator=RUN or generated=FOLDER")
    done = _extract(recipe, opened, log, world)
    return done | on_first(world, "the figures", _figures, recipe, opened, log)


def _figures(recipe: EvaluateRecipe, opened: Opened, log: Log) -> dict[str, Any]:
    """What `evaluate` returns beside what `extract` does, from stored features."""
    features = {name: opened.load(name, opened.extractor) for name in ("real", "generated")}
    if recipe.real_against == "train":
        features["train"] = opened.load("train", opened.extractor)
    pairs = _pairs(recipe, features, opened.extractor.called(opened.extractor.name))
    families = [metric for metric in recipe.metrics if metric in FAMILIES]
    _warn_few(pairs["generated"], families, recipe, log)
    measured = {name: _measured(pair, families, recipe) for name, pair in pairs.items()}
    figures = {
        figure: {name: of_pair[figure].as_dict() for name, of_pair in measured.items()}
        for figure in measured["generated"]
    }
    protocol = _protocol(recipe, opened)
    result = {
        "protocol": protocol.as_dict(),
        "protocol_fingerprint": protocol.fingerprint,
        "generated": {
            "name": opened.sets["generated"].name,
            "fingerprint": opened.sets["generated"].fingerprint,
        },
        "metrics": families,
        "counts": {n: [len(p.real), len(p.generated)] for n, p in pairs.items()},
        "figures": figures,
    }
    if "agreement" in recipe.metrics:
        result["labels"] = _agreement(recipe, opened)
    if "memorisation" in recipe.metrics:
        result["nearest"] = _nearest(recipe, opened)
    log.table(*result_table(result))
    return result


def _open(recipe: ExtractRecipe, generator: Generator | None, world: World | None) -> Opened:
    device = device_for(recipe.device, world)
    extractor = load_extractor(recipe.extractor.kind, recipe.extractor.weights).to(device)
    form = {"size": recipe.image_size, "channels": extractor.channels}
    sets: dict[str, PictureSet] = {"real": ShardPictures(recipe.real, **form)}
    classes = sets["real"].classes
    if recipe.generated:
        sets["generated"] = open_pictures(recipe.generated, classes=classes, **form)
    elif recipe.generator and generator is None:
        raise UserError(f"the recipe names the generator {recipe.generator}, but none was opened")
    elif generator is not None:
        sets["generated"] = GeneratedPictures(
            generator, recipe.samples, seed=recipe.seed, classes=classes, **form
        )
    if recipe.train:
        sets["train"] = ShardPictures(recipe.train, **form)
    judge = None
    if "agreement" in recipe.metrics:
        judge = load_extractor("classifier", recipe.judge).to(device) if recipe.judge else extractor
    pixels = None
    if "memorisation" in recipe.metrics:
        side = recipe.image_size or _stored_size(sets["real"])
        pixels = Extractor("pixels", input_size=side, channels=extractor.channels)
    return Opened(sets, extractor, judge, pixels, FeatureStore(recipe.store))


def _stored_size(pictures: PictureSet) -> int:
    return int(pictures.read(0, 1, Stages()).images.shape[1])


def _extract(
    recipe: ExtractRecipe, opened: Opened, log: Log, world: World | None
) -> dict[str, Any]:
    """Every set through its extractors."""
    rates, digests = {}, {}
    for name, pictures in opened.sets.items():
        wanted = opened.of(name)
        if name == "train" and getattr(recipe, "real_against", "halves") == "train":
            wanted = [opened.extractor, *wanted]
        if not wanted:
            continue
        rates[name] = extract_set(
            pictures, wanted, opened.store, batch_size=recipe.batch_size, log=log, world=world
        )
        digests[name] = feature_key(pictures, wanted[0]).digest()
    return {
        "extractor": {
            "name": opened.extractor.name,
            "version": opened.extractor.version,
            "weights_sha256": opened.extractor.weights_sha256,
            "dim": opened.extractor.dim,
        },
        "sets": digests,
        "sizes": {name: len(pictures) for name, pictures in opened.sets.items()},
        "images_per_second": rates,
    }


def _pairs(
    recipe: EvaluateRecipe, features: dict[str, FeatureSet], extractor: str
) -> dict[str, Pair]:
    """Generated against real; real against real; and the former at the latter's numbers."""

    def pair(real: FeatureSet, other: FeatureSet) -> Pair:
        if min(len(real), len(other)) <= recipe.k:
            raise UserError(
                f"{min(len(real), len(other))} pictures are too few for k={recipe.k}; "
                f"use more pictures or set k lower"
            )
        sides = real.features, other.features, extractor
        return Pair(*sides, real_labels=real.labels, generated_labels=other.labels)

    real, drawn = features["real"], features["generated"]
    if recipe.real_against == "halves":
        one, two = _halves(real, recipe.seed)
    else:
        one, other = real, features["train"]
        order = permute(np.arange(len(other)), len(other), recipe.seed, Stream.SPLIT, 1)
        two = other.rows(torch.from_numpy(order))
    count = min(len(two), len(drawn))
    return {
        "generated": pair(real, drawn),
        "matched": pair(one, _spread(drawn, count)),
        "real": pair(one, two.rows(torch.arange(count))),
    }


def _measured(pair: Pair, families: list[str], recipe: EvaluateRecipe) -> dict[str, Interval]:
    """Every figure of a pair with its interval."""
    found = {}
    for name in families:
        metric, options = _asked(name, recipe)
        estimates = measure(replace(pair, options=options), metric, recipe.interval, recipe.seed)
        found |= {figure: one.interval(recipe.interval) for figure, one in estimates.items()}
    return found


def _asked(name: str, recipe: EvaluateRecipe) -> tuple[registry.Metric, Config]:
    metric = METRICS.get(name)
    return metric, PrdcOptions(k=recipe.k) if name == "prdc" else metric.options()


def _spread(side: FeatureSet, count: int) -> FeatureSet:
    """So many rows with the class shares of all."""
    return side.rows(torch.tensor(spread(side.labels.tolist(), count)))


def _halves(real: FeatureSet, seed: int) -> tuple[FeatureSet, FeatureSet]:
    """Two random halves with equal shares of every class; the second in random order."""
    order = permute(np.arange(len(real)), len(real), seed, Stream.SPLIT, 0)
    order = order[np.argsort(real.labels.numpy()[order], kind="stable")]
    one, two = order[0::2], order[1::2]
    two = two[permute(np.arange(len(two)), len(two), seed, Stream.SPLIT, 2)]
    return real.rows(torch.from_numpy(one)), real.rows(torch.from_numpy(two))


def _warn_few(pair: Pair, families: list[str], recipe: EvaluateRecipe, log: Log) -> None:
    for name in families:
        metric, options = _asked(name, recipe)
        counts = len(pair.real), len(pair.generated)
        for short in shortages(metric, options, pair.generated.shape[1], *counts):
            log.warn(str(short))


def _protocol(recipe: EvaluateRecipe, opened: Opened) -> Protocol:
    drawn = opened.sets["generated"].protocol
    sampler = drawn.get("sampler")
    if isinstance(sampler, dict):  # so that a sweep of the guidance differs in one field alone
        guidance = {n: v for n, v in sampler.items() if n.startswith("guidance")}
        sampler = {n: v for n, v in sampler.items() if n not in guidance}
        drawn = {"guidance": guidance} | drawn | {"sampler": sampler}
    profile = stated(drawn, "profile")
    seeds = {key: drawn[key] for key in ("seed", "labels") if key in drawn}
    return Protocol(
        extractor=opened.extractor.called(opened.extractor.name),
        extractor_version=opened.extractor.version,
        weights_sha256=opened.extractor.weights_sha256,
        resize=f"{opened.extractor.resize} to {opened.extractor.input_size}",
        image_size=recipe.image_size,
        fit=FIT if recipe.image_size else "as stored",
        rounding=stated(drawn, "rounding"),
        dtype="float32",
        reference=opened.sets["real"].fingerprint,
        n_real=len(opened.sets["real"]),
        n_generated=len(opened.sets["generated"]),
        k=recipe.k,
        guidance=stated(drawn, "guidance"),
        sampler=stated(drawn, "sampler"),
        profile=recipe.weights or profile if profile == NOT_STATED else profile,
        seeds=stated({"seeds": seeds or None}, "seeds"),
        judge=_judged_by(opened),
        training=opened.sets["train"].fingerprint if _uses_training(recipe) else "",
    )


def _judged_by(opened: Opened) -> str:
    """The judge's weights; "" where nothing is judged, or by the network of the features."""
    judge, own = opened.judge, opened.extractor.weights_sha256
    return "" if judge is None or judge.weights_sha256 == own else judge.weights_sha256


def _uses_training(recipe: EvaluateRecipe) -> bool:
    return "memorisation" in recipe.metrics or recipe.real_against == "train"


def _agreement(recipe: EvaluateRecipe, opened: Opened) -> dict[str, Any]:
    """How many pictures the judge labels as asked, overall and per class."""
    found = opened.load("generated", opened.judge)
    if bool((found.labels < 0).any()):
        raise UserError(
            f"{opened.sets['generated'].name}: pictures without a label cannot be judged; put them "
            f"in one folder per class, or leave agreement out of metrics"
        )
    classes = opened.judge.backbone.classes
    predicted = opened.judge.backbone.predict(found.features)
    generated = opened.sets["generated"]
    labels = as_judged(found.labels, generated.classes, classes, generated.name)
    share, per_class = label_agreement(predicted, labels, len(classes))
    as_interval = proportion(share, len(found), recipe.interval)
    asked = {n: v for n, v in zip(classes, per_class, strict=True) if v == v}
    return {"agreement": as_interval.as_dict(), "per_class": asked, "lowest": min(asked.values())}


def _nearest(recipe: EvaluateRecipe, opened: Opened) -> dict[str, Any]:
    """Distances to the nearest training picture, of generated and of held-out real pictures."""
    train = opened.load("train", opened.pixels).features
    result: dict[str, Any] = {}
    for name in ("generated", "real"):
        near = nearest_pictures(opened.load(name, opened.pixels).features, train)
        result[name] = near.figures()
        result[name]["interval"] = _median_interval(near.distance, recipe).as_dict()
    return result


def _median_interval(distance: torch.Tensor, recipe: EvaluateRecipe) -> Interval:
    split = halves(len(distance), recipe.interval.replicates, recipe.seed)
    drawn = np.array([float(distance[rows].double().quantile(0.5)) for rows in split])
    value = float(distance.double().quantile(0.5))
    return interval("median nearest distance", value, drawn, recipe.interval, kind="local")
