"""Deliberate practice: a classifier that learns from generated pictures only, beside its baselines.

Called by `etude practice`. The practice arm is Algorithm 1 of arXiv 2502.15588: N unguided pictures
to start with; whenever the monitor accuracy stops rising, P more, drawn toward what the learner of
that moment finds hard, join the pool, from which mini batches are drawn uniformly; nothing joins in
the cool-down. Beside it, with the same initial weights, tuning and number of steps:

    static   the practice arm's final number of pictures, unguided, all from the start
    omega0   the practice arm's additions at the same steps, unguided
    real     the real training pictures

The monitor split decides when the practice arm adds; the test split is looked at once, at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from etude.core.errors import UserError
from etude.core.log import Log, Progress
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.data.order import PoolOrder
from etude.data.pool import Pool

from .arms import Arm
from .checks import refuse_overlap, same_classes
from .learner import Learner, weights_hash
from .paired import accuracy_interval, paired_difference
from .pictures import Stored, load_split
from .recipe import PracticeRecipe
from .scores import correctness
from .supply import Generator, Supply, cost_of
from .telemetry import report_round


@dataclass(frozen=True)
class Job:
    """What all arms of a run share; `added_at` is the practice arm's, once it has ended."""

    recipe: PracticeRecipe
    run: Run
    generator: Generator
    supply: Supply
    monitor: Stored
    test: Stored
    log: Log
    stopper: Stopper
    show: Callable[[], None]
    added_at: Sequence[int] = ()


def practise(
    recipe: PracticeRecipe,
    run: Run,
    generator: Generator,
    log: Log,
    stopper: Stopper,
    *,
    show: Callable[[], None] = lambda: None,
) -> dict:
    """Train every arm of the recipe and compare them; go on where an earlier call stopped.

    Args:
        generator: draws the pictures; see `supply.Generator`.
        show: called after every round and at the end of every arm, for example to write a page.

    Returns:
        `{"arms": {name: figures}, "differences": {"practice - static": interval, ...}}`, or
        `{"stopped": reason, "images_seen": n}` when asked to stop before the end.

    Raises:
        UserError: the splits do not fit the generator, or overlap with its training pictures.
    """
    job = _open(recipe, run, generator, log, stopper, show)
    results: dict[str, dict] = {}
    correct: dict[str, np.ndarray] = {}
    for name in recipe.arms:
        if name in ("static", "omega0"):
            job = Job(**{**vars(job), "added_at": results["practice"]["added_at"]})
        ended = run_arm(name, job)
        if ended is None:
            return {"stopped": stopper.requested, "images_seen": log_position(job, name, 0)}
        results[name], correct[name] = ended
    result = {"arms": results, "differences": _compare(correct)}
    _show(result, log)
    return result


def run_arm(name: str, job: Job) -> tuple[dict, np.ndarray] | None:
    """Train one arm to its end; its figures and correctness, or None when asked to stop."""
    recipe, log = job.recipe, job.log
    steps, batch, weights = recipe.schedule.steps, recipe.learner.batch, recipe.trigger.weights
    folder = job.run.folder / "arms" / name
    learner = Learner(recipe.learner, recipe.seed, job.generator.device)
    arm = Arm(name, folder, learner, recipe.save_every)
    if (ended := arm.finished()) is not None:
        _share_pool(name, job, ended[0])
        return ended
    arm.resume()
    state = arm.state
    log.rewind(log_position(job, name, state.step) + (1 if state.step else 0))
    if name == "real":
        pool = load_split(recipe.real_train, recipe.pictures)
    else:
        pool = job.supply.pool(name)
        pool.rewind(state.step * batch)  # from here on it holds what the next step may draw from

    with log.progress(f"{name}: learning", steps, unit="steps", done=state.step) as progress:
        while True:
            if not _fill(arm, pool, job, progress):
                return None
            if state.step == steps:
                break
            if job.stopper.requested:
                arm.save()
                return None
            positions = np.arange(state.step * batch, (state.step + 1) * batch)
            rows = PoolOrder(recipe.seed, [(0, len(pool))]).index(positions)
            loss = learner.step(
                pool.images(rows), pool.labels(rows), positions, recipe.schedule.rate(state.step)
            )
            state.step += 1
            progress.advance(1)

            if state.step % recipe.trigger.evaluate_every == 0 or state.step == steps:
                accuracy = arm.look(job.monitor, weights)
                log.metrics(
                    f"practice/{name}",
                    log_position(job, name, state.step),
                    step=state.step,
                    monitor_accuracy=accuracy,
                    loss=float(loss),
                    samples=len(pool),
                )
                progress.advance(0, accuracy=accuracy, pictures=f"{len(pool):,}")
                if _asks(arm, job, accuracy):
                    state.plateau.add_round()
                    state.added_at.append(state.step)
                    arm.save(trigger=True)
            arm.save_if_due()

    arm.save()
    result, correct = _judge(arm, pool, job)
    arm.finish(result, correct)
    _share_pool(name, job, result)
    job.show()
    return result, correct


def _open(
    recipe: PracticeRecipe,
    run: Run,
    generator: Generator,
    log: Log,
    stopper: Stopper,
    show: Callable[[], None],
) -> Job:
    """Load the real splits and refuse what would make the result meaningless."""
    monitor = load_split(recipe.monitor, recipe.pictures)
    test = load_split(recipe.test, recipe.pictures)
    for split, folder in ((monitor, recipe.monitor), (test, recipe.test)):
        same_classes(generator.classes, split.class_names, generator.name, folder)
    if recipe.learner.model.num_classes != len(generator.classes):
        raise UserError(
            f"{generator.name} draws {len(generator.classes)} classes: set "
            f"learner.model.num_classes={len(generator.classes)}"
        )
    if generator.training_shards:
        training = load_split(generator.training_shards, recipe.pictures)
        refuse_overlap(
            test,
            training,
            recipe.duplicate_distance,
            recipe.test,
            f"the generator's training pictures in {generator.training_shards}",
        )
    else:
        log.warn(
            "the generator's training pictures are not known: overlap with the test split "
            "was not checked"
        )
    refuse_overlap(
        test, monitor, recipe.duplicate_distance, recipe.test, f"the monitor split {recipe.monitor}"
    )
    supply = Supply(generator, recipe.guidance, recipe.seed, recipe.chunk, run.folder / "pools")
    return Job(recipe, run, generator, supply, monitor, test, log, stopper, show)


def _fill(arm: Arm, pool: Pool | Stored, job: Job, progress: Progress) -> bool:
    """Draw what the arm's pool still lacks, and report a round that has become whole."""
    recipe, state = job.recipe, arm.state
    if isinstance(pool, Stored):
        return True
    rounds = len(job.added_at) if arm.name == "static" else state.plateau.rounds
    report = arm.folder / "rounds" / f"{rounds:03d}.json"
    guided = arm.name == "practice" and rounds > 0
    whole = len(pool) >= recipe.size(rounds)
    if whole and (not guided or report.exists()):
        return True
    arm.count_seconds()
    learner = arm.learner.frozen(recipe.trigger.weights) if guided else None
    filled = job.supply.fill(
        pool,
        recipe.size(rounds),
        visible_from=state.step * recipe.learner.batch,
        round_number=rounds,
        learner=learner,
        stopped=lambda: job.stopper.requested is not None,
        advance=lambda: progress.advance(0, drawn=f"{len(pool):,}/{recipe.size(rounds):,}"),
    )
    if filled and guided:
        ends = [recipe.size(k) for k in range(rounds + 1)]
        report_round(
            report.parent, rounds, learner, pool, ends, job.supply, probe=recipe.probe_samples
        )
        job.show()
    arm.restart_clock()
    return filled


def _asks(arm: Arm, job: Job, accuracy: float) -> bool:
    """Whether a round is added after this look."""
    state = arm.state
    if arm.name == "practice":
        waited_enough = state.plateau.observe(accuracy, job.recipe.trigger)
        return waited_enough and job.recipe.may_add(state.plateau.rounds, state.step)
    return arm.name == "omega0" and state.step in job.added_at


def _share_pool(name: str, job: Job, result: dict) -> None:
    """Later arms copy this arm's unguided pictures instead of drawing them again."""
    if name != "real":
        unguided = job.recipe.start_samples if name == "practice" else result["samples"]
        job.supply.share(name, job.supply.pool(name), unguided)


def _judge(arm: Arm, pool: Pool | Stored, job: Job) -> tuple[dict, np.ndarray]:
    """The arm's figures on the test split, looked at for the first and only time."""
    learner = arm.learner.frozen(job.recipe.trigger.weights)
    correct = correctness(learner, job.test)
    interval = accuracy_interval(int(correct.sum()), len(correct))
    drawn = cost_of(pool) if isinstance(pool, Pool) else {"evaluations": 0.0, "seconds": 0.0}
    return {
        "test_accuracy": interval.value,
        "test_interval": [interval.low, interval.high],
        "monitor_accuracy": arm.state.looks[-1][1],
        "samples": len(pool),
        "rounds": len(arm.state.added_at),
        "added_at": arm.state.added_at,
        "steps": arm.state.step,
        "generator_evaluations": int(drawn["evaluations"]),
        "drawing_seconds": drawn["seconds"],
        "learning_seconds": arm.state.seconds,
        "looks": arm.state.looks,
        "learner": weights_hash(learner),
    }, correct


def _compare(correct: dict[str, np.ndarray]) -> dict[str, dict]:
    """Paired differences of test accuracy between the first arm and each other one."""
    first, *others = correct
    return {
        f"{first} - {other}": vars(paired_difference(correct[first], correct[other]))
        for other in others
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
            f"{arm['generator_evaluations']:,}",
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
        "denoiser evaluations",
        "seconds drawing + learning",
    ]
    log.table("Accuracy on real test pictures", columns, rows)
    for name, gap in result["differences"].items():
        log.info(
            f"{name}: {gap['value']:+.4f}, 95% interval [{gap['low']:+.4f}, {gap['high']:+.4f}] "
            f"over test pictures, McNemar p {gap['p_value']:.3f}"
        )


def log_position(job: Job, name: str, step: int) -> int:
    """Where an arm's step stands in the run's metrics: arms follow one another."""
    recipe = job.recipe
    place = recipe.arms.index(name)
    return (place * (recipe.schedule.steps + 1) + step) * recipe.learner.batch
