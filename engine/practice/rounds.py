"""Deliberate practice: a classifier that learns from generated pictures only, beside its baselines.

Called by `etude practice`. The practice arm is Algorithm 1 of arXiv 2502.15588: N unguided pictures
to start with; whenever the monitor accuracy stops rising, P more, drawn toward what the learner of
that moment finds hard, join the pool, from which mini batches are drawn uniformly; nothing joins in
the cool-down. The other arms (`recipe.ArmConfig`) have the same initial weights, tuning and number
of steps. The monitor split decides when the practice arm adds; the test splits are looked at once,
at the end of each arm.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude.core.distributed import FOREVER_S, World, exchange
from etude.core.errors import UserError
from etude.core.files import read_json
from etude.core.log import Log
from etude.core.recipe import Recipe, differences
from etude.core.run import Run, load_run
from etude.core.signals import Stopper
from etude.data.class_list import open_classes

from .checks import overlap, refuse, same_classes
from .course import Job, branches, run_arm
from .flips import Judge
from .paired import paired_difference
from .pictures import Pictures, load_split
from .recipe import ArmConfig, PracticeRecipe
from .supply import STOPPING, Facts, Generator, Studio, Supply

_SHARED = 0.01  # of the test pictures may be in the monitor, which large data sets cannot avoid
_OF_A_BRANCH = ("kind", "seed", "learner", "pictures", "start_samples", "round_samples")
_OF_A_BRANCH += ("newest_weight", "sampler")
_SHOW_S = 20.0  # between two writings of the page
_REAL_FIRST = ("real", "mixed")


@dataclass(frozen=True)
class Drawing:
    """Who draws a run's pictures.

    Attributes:
        facts: the generator, wherever it is.
        open_generator: opens it here.
        apart: other processes draw, and this one only should none of them be left.
        origin: how the generator was opened, for `rebuild`; JSON-serialisable.
    """

    facts: Facts
    open_generator: Callable[[], Generator]
    apart: bool = False
    origin: dict[str, Any] | None = None

    @classmethod
    def by(cls, generator: Generator) -> "Drawing":
        """An open generator in this process."""
        return cls(Facts.of(generator), lambda: generator)


def practise(
    recipe: PracticeRecipe,
    run: Run,
    generator: Generator | Drawing,
    log: Log,
    stopper: Stopper,
    *,
    world: World | None = None,
    judge: Callable | None = None,
    show: Callable[[], None] = lambda: None,
) -> dict:
    """Train every arm of the recipe and compare them; go on where an earlier call stopped.

    Args:
        generator: draws the pictures (`supply.Generator`), or says who does.
        world: the processes that learn, which all call this together; by default this one alone.
        judge: pictures (B, C, S, S) in [-1, 1] -> logits, trained on real pictures.
        show: called now and then after rounds and arms, and at the end, to write a page perhaps.

    Returns:
        `{"arms": {name: figures}, "differences": {"practice - static": interval, ...}}`, or
        `{"stopped": reason, "images_seen": n}` when asked to stop before the end.

    Raises:
        UserError: the splits do not fit the generator, or overlap with its training pictures.
    """
    drawing = generator if isinstance(generator, Drawing) else Drawing.by(generator)
    if world is None:
        device = torch.device("cpu") if drawing is generator else generator.device
        world = World(0, 1, 0, device)
    seldom = _seldom(show)
    result = _run_arms(_open(recipe, run.folder, drawing, log, stopper, world, judge, seldom))
    if world.rank == 0:
        show()
    return result


def _seldom(show: Callable[[], None]) -> Callable[[], None]:
    """The same at most every so many seconds: a page takes one, and small rounds come fast."""
    shown = 0.0

    def show_or_not() -> None:
        nonlocal shown
        if time.monotonic() - shown > _SHOW_S:
            show()
            shown = time.monotonic()

    return show_or_not


def _run_arms(job: Job) -> dict:
    recipe = job.recipe
    results: dict[str, dict] = {}
    correct: dict[str, np.ndarray] = {}
    for config in recipe.arms:
        for title, trigger in _titles(config, job):
            practice = results.get("practice", job.practice)
            job = replace(job, practice=practice, place=len(results))
            ended = run_arm(config, title, job, trigger)
            if ended is None:
                reason = job.stopper.requested or "another process was asked to stop"
                return {"stopped": reason, "images_seen": job.position(0)}
            results[title], correct[title] = ended[0], ended[1]["test"]
    result = {"arms": real_first(results), "differences": _compare(correct)}
    _show(result, job.log)
    return result


def real_first(results: dict[str, dict]) -> dict[str, dict]:
    """Arms and their figures, those that learn from real pictures before the others."""
    order = sorted(results, key=lambda title: results[title]["kind"] not in _REAL_FIRST)
    return {title: results[title] for title in order}


def _titles(config: ArmConfig, job: Job) -> list[tuple[str, Path | None]]:
    """The arms that an entry of the recipe stands for."""
    if config.kind != "branch":
        return [(config.title, None)]
    found = branches(config, job.origin)
    asked = config.rounds if config.rounds is not None else [0]
    if len(found) < len(asked):
        job.log.warn(f"arm {config.title}: of rounds {asked} the practice arm has {len(found)}")
    return list(found)


def _open(
    recipe: PracticeRecipe,
    folder: Path,
    drawing: Drawing,
    log: Log,
    stopper: Stopper,
    world: World,
    judge: Callable | None,
    show: Callable[[], None],
) -> Job:
    """Load the real splits and refuse what would make the result meaningless."""
    facts = drawing.facts
    for field in ("monitor", "test"):
        if not getattr(recipe, field):
            raise UserError(
                f"recipe {recipe.name} names no {field} pictures: add {field}=FOLDER of shards, or"
                " layout:FOLDER"
            )
    if recipe.learner.model.num_classes != len(facts.classes):
        raise UserError(
            f"{facts.name} draws {len(facts.classes)} classes: set "
            f"learner.model.num_classes={len(facts.classes)}"
        )
    drawn, real_size = facts.image_size, recipe.pictures.image_size
    if not recipe.learner.side and drawn != real_size:
        raise UserError(
            f"{facts.name} draws pictures of {drawn} pixels and pictures.image_size is {real_size}:"
            f" make them equal, or set learner.input_size={real_size}"
        )
    classes = open_classes(recipe.classes, recipe.whole_classes)
    monitor = load_split(recipe.monitor, recipe.pictures, classes)
    tests = {
        name: load_split(source, recipe.pictures, classes)
        for name, source in ({"test": recipe.test} | recipe.tests).items()
    }
    real = load_split(recipe.real_train, recipe.pictures, classes) if recipe.real_train else None
    splits = [(recipe.monitor, monitor), (recipe.test, tests["test"])]
    splits += [(recipe.tests[name], split) for name, split in tests.items() if name != "test"]
    splits += [(recipe.real_train, real)] if real is not None else []
    for name, split in splits:
        same_classes(facts.classes, split.class_names, facts.name, name)
    if world.rank == 0:
        _refuse_seen(recipe, facts, tests["test"], monitor, log)
    studio = Studio(drawing.open_generator, recipe.learner, folder / "pools", world.device)
    supply = Supply(
        facts,
        studio,
        recipe.guidance,
        recipe.seed,
        recipe.chunk,
        place=(world.rank, world.size),
        apart=drawing.apart,
        origin=drawing.origin,
    )
    if world.rank == 0:
        (supply.root / STOPPING).unlink(missing_ok=True)
    exchange(world, "the splits are open", None, FOREVER_S, stopped=lambda: stopper.requested)
    origin, practice = folder, None
    if recipe.branch_from:
        other, origin = load_run(recipe.branch_from)
        _refuse_another_recipe(recipe, other)
        ended = origin / "arms" / "practice" / "result.json"
        practice = read_json(ended) if ended.exists() else None
    measured = None
    if judge is not None and world.rank == 0:
        measured = Judge.measured(judge, monitor, len(facts.classes), recipe.judge)
    return Job(
        recipe,
        folder,
        origin,
        supply,
        world,
        real,
        monitor,
        tests,
        log,
        stopper,
        show,
        measured,
        practice,
    )


def _refuse_another_recipe(recipe: PracticeRecipe, other: Recipe) -> None:
    """A branch goes on with the learner and the pool of the run that it forks from."""
    for field, ours, theirs in differences(recipe, other):
        if field.split(".")[0] in _OF_A_BRANCH:
            raise UserError(
                f"branch_from={recipe.branch_from} has {field}={theirs} and this recipe {ours}: a"
                " branch goes on as it began, make them equal"
            )


def _refuse_seen(
    recipe: PracticeRecipe, facts: Facts, test: Pictures, monitor: Pictures, log: Log
) -> None:
    """No test picture may be among those that the generator or the trigger has seen."""
    if facts.training_shards:
        training = load_split(facts.training_shards, recipe.pictures)
        pairs = overlap(test, training, recipe.duplicate_distance)
        where = f"the generator's training pictures in {facts.training_shards}"
        refuse(pairs, len(test), recipe.test, where)
    else:
        log.warn(
            "the generator's training pictures are not known: overlap with the test split "
            "was not checked"
        )
    pairs = overlap(test, monitor, recipe.duplicate_distance)
    if len(pairs) > _SHARED * len(test):
        refuse(pairs, len(test), recipe.test, f"the monitor split {recipe.monitor}")
    elif pairs:
        log.warn(
            f"{len(pairs):,} of {len(test):,} pictures of {recipe.test} are (nearly) among"
            f" the monitor split {recipe.monitor}"
        )


def _compare(correct: dict[str, np.ndarray]) -> dict[str, dict]:
    """Paired differences of test accuracy between practice, or the first arm, and each other."""
    first = "practice" if "practice" in correct else next(iter(correct))
    return {
        f"{first} - {other}": vars(paired_difference(correct[first], correct[other]))
        for other in correct
        if other != first
    }


def _show(result: dict, log: Log) -> None:
    rows = [
        [
            name,
            f"{arm['test_accuracy']:.4f}",
            "[{:.4f}, {:.4f}]".format(*arm["test_interval"]),
            f"{arm['monitor_accuracy']:.4f}",
            f"{arm['samples']:,}",
            str(arm["rounds"]),
            f"{arm['passes']:,.0f}",
            f"{arm['drawing_seconds']:.0f} + {arm['learning_seconds']:.0f}",
        ]
        for name, arm in result["arms"].items()
    ]
    columns = [
        "arm",
        "test accuracy",
        "95% interval",
        "monitor",
        "pictures",
        "rounds",
        "denoiser passes",
        "seconds drawing + learning",
    ]
    log.table("Accuracy on real test pictures", columns, rows)
    for name, gap in result["differences"].items():
        log.info(
            f"{name}: {gap['value']:+.4f}, 95% interval [{gap['low']:+.4f}, {gap['high']:+.4f}] "
            f"over test pictures, McNemar p {gap['p_value']:.3f}"
        )
