"""One arm's course: from its first picture to its figures; called by rounds.py.

Every kind of arm is the same loop: at each step it learns a batch of what its source shows, and now
and then it looks at the monitor. A round is asked for, drawn by whoever draws, and put into the
pool before the step that was named when it was asked for, so where and how fast it is drawn changes
nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from etude.core.checkpoint import step_of
from etude.core.distributed import FOREVER_S, World, any_rank, exchange
from etude.core.errors import UserError
from etude.core.log import Log, Progress
from etude.core.signals import Stopper
from etude.data.pool import Pool
from etude.data.pool_parts import part_images

from .arms import Arm, Pending, correct_of_all
from .feed import Ahead
from .flips import Judge
from .learner import Learner, weights_hash
from .paired import accuracy_interval
from .pictures import Pictures
from .recipe import ArmConfig, PracticeRecipe
from .sources import Source, open_source
from .supply import STOPPING, Request, Supply, passes
from .telemetry import report_round


@dataclass(frozen=True)
class Job:
    """What all arms of a run share.

    Attributes:
        folder: of the run.
        origin: the run whose practice arm is copied and branched from.
        world: the processes that learn.
        real: the real training pictures, for the arms that learn from them.
        tests: test sets by name; "test" is the one that arms are compared on.
        judge: estimates how many pictures lost their class; None for none.
        practice: the practice arm's result, once it has ended.
        place: how many arms ended before this one, which orders the run's metrics.
    """

    recipe: PracticeRecipe
    folder: Path
    origin: Path
    supply: Supply
    world: World
    real: Pictures | None
    monitor: Pictures
    tests: dict[str, Pictures]
    log: Log
    stopper: Stopper
    show: Callable[[], None]
    judge: Judge | None = None
    practice: dict | None = None
    place: int = 0

    def position(self, step: int) -> int:
        """Where an arm's step stands in the run's metrics: arms follow one another."""
        batch = self.recipe.learner.batch
        return (self.place * (self.recipe.schedule.steps + 1) + step) * batch


Ended = tuple[dict, dict[str, np.ndarray]]


def run_arm(config: ArmConfig, title: str, job: Job, trigger: Path | None = None) -> Ended | None:
    """Train one arm to its end.

    Args:
        title: names the arm and its folder.
        trigger: the checkpoint that a branch begins at.

    Returns:
        Its figures and correctness by test set, or None when asked to stop.
    """
    return _Course(config, title, job, trigger).run()


class _Course:
    """An arm on its way."""

    def __init__(self, config: ArmConfig, title: str, job: Job, trigger: Path | None) -> None:
        recipe = job.recipe
        self.config, self.job, self.recipe, self.trigger = config, job, recipe, trigger
        self.learner = Learner(recipe.learner, recipe.seed, job.world, recipe.strategy)
        self.arm = Arm(title, job.folder / "arms" / title, self.learner, recipe.save_every)
        self.lead = job.world.rank == 0
        self.posted: Request | None = None

    def run(self) -> Ended | None:
        """See `run_arm`."""
        job, arm, log = self.job, self.arm, self.job.log
        if (ended := arm.finished()) is not None:
            return ended
        if not arm.resume():
            self._begin()
        state = arm.state
        log.rewind(job.position(state.step) + (1 if state.step else 0))
        self.source = self._open_source()
        self.ahead = Ahead(self.source.fetch, self.recipe.learner.batch)
        total = self.recipe.schedule.end(state.cooldown_at)
        try:
            with log.progress(f"{arm.name}: learning", total, "steps", state.step) as progress:
                if not self._learn(progress):
                    return None
        finally:
            self.ahead.close()
        arm.save()
        return self._finish()

    def _begin(self) -> None:
        state = self.arm.state
        if self.trigger is not None:
            self.arm.load(self.trigger)
            state = self.arm.state
            state.pending, state.added_at = None, state.added_at[:-1]
            state.plateau.rounds -= 1
        elif self.config.kind != "real":
            state.pending = Pending(0, 0)
        if self.job.practice is not None and self.config.kind != "practice":
            state.cooldown_at = self.job.practice["cooldown_at"]

    def _open_source(self) -> Source:
        job, state = self.job, self.arm.state
        source = open_source(
            self.config,
            self.arm.name,
            self.recipe,
            job.supply,
            real=job.real,
            practice=job.practice,
            pools=job.origin / "pools",
            last_round=state.plateau.rounds,
            device=job.world.device,
        )
        if self.lead:
            source.rewind(state.step * self.recipe.learner.batch)
            for pool in source.own_pools:
                self._refuse_another_generator(pool)
                job.supply.describe(pool.folder.name)
            job.supply.forget(self.arm.name)
        self._together("the pool as it was")
        source.refresh()
        return source

    def _refuse_another_generator(self, pool: Pool) -> None:
        own, other = self.job.supply.facts, {entry.generator for entry in pool.parts}
        if other - {own.fingerprint}:
            raise UserError(
                f"{pool.folder} was drawn by {', '.join(sorted(other))} and the generator"
                f" {own.name} is {own.fingerprint} now: name the one it was, or start another run"
                " with run=NAME"
            )

    def _learn(self, progress: Progress) -> bool:
        """Steps, looks and rounds to the end; False when asked to stop."""
        arm, recipe, job = self.arm, self.recipe, self.job
        state, trigger = arm.state, recipe.trigger
        while True:
            if not self._settle(progress):
                return False
            end = recipe.schedule.end(state.cooldown_at)
            if state.step == end:
                return True
            if any_rank(job.world, job.stopper.requested is not None):
                arm.save()
                return False
            rate = recipe.schedule.rate(state.step, state.cooldown_at)
            loss = self.learner.step(self.ahead, state.step, rate)
            state.step += 1
            progress.advance(1)
            if state.step % trigger.evaluate_every == 0 or state.step == end:
                accuracy = arm.look(job.monitor, trigger.weights, self.source.samples)
                arm.count_seconds()
                job.log.metrics(
                    f"practice/{arm.name}",
                    job.position(state.step),
                    step=state.step,
                    monitor_accuracy=accuracy,
                    loss=float(loss),
                    samples=self.source.samples,
                    seconds=self._learning_seconds + self.source.cost.get("seconds", 0.0),
                )
                shown = f"{self.source.samples:,}"
                progress.advance(0, accuracy=accuracy, pictures=shown)
                if self._asks(accuracy):
                    self._ask()
            arm.save_if_due()

    @property
    def _learning_seconds(self) -> float:
        """Of all processes together, as those of drawing are."""
        return self.arm.state.seconds * self.job.world.size

    def _asks(self, accuracy: float) -> bool:
        """Whether a round is asked for after this look."""
        state, recipe = self.arm.state, self.recipe
        if self.source.rounds_at is not None:
            return state.step in self.source.rounds_at
        grown = self.source.samples / recipe.start_samples
        waited_enough = state.plateau.observe(accuracy, recipe.trigger, grown)
        if state.pending is not None:  # the wait is for what the coming pictures bring
            state.plateau.waited = 0
            return False
        if not waited_enough or state.cooldown_at is not None:
            return False
        rounds, spent = state.plateau.rounds, passes(self.source.cost)
        limit = recipe.max_evaluations
        if not recipe.room_for(rounds) or (limit and spent >= limit):
            if recipe.at_limit == "cool_down" and state.step < recipe.schedule.cooldown_start:
                state.cooldown_at = state.step
            return False
        return recipe.may_add(rounds, state.step)

    def _ask(self) -> None:
        """Note a round, keep the learner that guides it, and the state to branch from."""
        arm, state, job = self.arm, self.arm.state, self.job
        state.plateau.add_round(self.recipe.trigger)
        state.added_at.append(state.step)
        guide = self.source.guide
        if guide is None:
            frozen, pool = self.learner.frozen(self.recipe.trigger.weights), self.source.pool
            assert pool is not None
            name = job.supply.keep_learner(pool.folder.name, frozen) if self.lead else ""
            guide = self._together("the learner that guides", name)[0]
            job.supply.studio.remember(guide, frozen)
        visible_at = state.step + self.recipe.trigger.delay_steps
        state.pending = Pending(state.plateau.rounds, visible_at, guide)
        arm.save(trigger=True)

    def _settle(self, progress: Progress) -> bool:
        """Have a round asked for as soon as it is known, and put it into the pool when it is due;
        False when asked to stop before it is there."""
        state, supply = self.arm.state, self.job.supply
        pending = state.pending
        if pending is None:
            return True
        if self.posted is None:
            self.posted = self.source.request(pending)
            if self.lead and not self.source.has(pending.round):
                self.posted.post(supply.root)
        if state.step < pending.visible_at:
            return True
        self.arm.count_seconds()
        request, parts = self.posted, len(self.posted.wanted)
        there = self.source.has(pending.round) or supply.complete(
            request,
            stopped=self._stop_asked,
            advance=lambda count: progress.advance(0, drawing=f"{count}/{parts} parts"),
        )
        if not all(self._together("a round is drawn", there)):
            self.arm.save()
            return False
        self.ahead.forget()
        if self.lead:
            self.source.publish(pending, request)
            request.withdraw(supply.root)
        self._together("a round is published")
        self.source.refresh()
        if self.lead and pending.learner:
            self._warn_of_nonfinite(pending)
            self._report(pending, request)
        self._together("a round is reported")
        state.pending = self.posted = None
        self.arm.restart_clock()
        return True

    def _stop_asked(self) -> bool:
        """Whether some process was asked to stop, while each is at work for itself."""
        mark = self.job.supply.root / STOPPING
        if self.job.stopper.requested is not None:
            mark.touch()
        return mark.exists()

    def _together(self, what: str, value: Any = None) -> list[Any]:
        """Every learning process's value; ends when asked to stop though some never come."""
        job = self.job
        return exchange(job.world, what, value, FOREVER_S, stopped=lambda: job.stopper.requested)

    def _warn_of_nonfinite(self, pending: Pending) -> None:
        pool = self.source.pool
        assert pool is not None
        costs = pool.costs(pending.round)
        steps = sum(cost.get("nonfinite", 0.0) for cost in costs)
        if steps:
            self.job.log.warn(
                f"{self.arm.name}, round {pending.round}: {steps:,.0f} guided steps of a picture"
                " had a gradient that was not finite and pushed nothing; try"
                " guidance.decode_precision=fp32, or a smaller learner.lr"
            )

    def _report(self, pending: Pending, request: Request) -> None:
        """The round's figures and its hardest pictures, unless they stand there already."""
        folder = self.arm.folder / "rounds"
        if (folder / f"{pending.round:03d}.json").exists():
            return
        recipe, supply, pool = self.recipe, self.job.supply, self.source.pool
        assert pool is not None
        twins = None
        if request.beside:
            places = [np.arange(key.first, key.first + key.count) for key in request.beside]
            pictures = [part_images(pool.folder / key.folder) for key in request.beside]
            twins = np.concatenate(places), np.concatenate(pictures)
        report_round(
            folder,
            pending.round,
            supply.studio.guide(pool.folder.name, pending.learner),
            pool,
            [recipe.size(number) for number in range(pending.round + 1)],
            twins,
            self.job.judge,
        )
        self.job.show()

    def _finish(self) -> Ended:
        """The arm's figures on the test sets, looked at for the first and only time."""
        arm, job, state, source = self.arm, self.job, self.arm.state, self.source
        learner = self.learner.frozen(self.recipe.trigger.weights)
        correct = {n: correct_of_all(learner, s, job.world) for n, s in job.tests.items()}
        figures = {}
        for name, right in correct.items():
            interval = accuracy_interval(int(right.sum()), len(right))
            figures[name] = [interval.value, interval.low, interval.high]
        cost = source.cost
        result = {
            "kind": self.config.kind,
            "test_accuracy": figures["test"][0],
            "test_interval": figures["test"][1:],
            "tests": figures,
            "monitor_accuracy": state.looks[-1][1],
            "samples": source.samples,
            "rounds": len(state.added_at),
            "added_at": state.added_at,
            "steps": state.step,
            "cooldown_at": state.cooldown_at,
            "generator_evaluations": int(cost.get("evaluations", 0)),
            "generator_gradients": int(cost.get("gradients", 0)),
            "passes": passes(cost),
            "passes_per_picture": passes(cost) / max(source.drawn, 1),
            "drawing_seconds": cost.get("seconds", 0.0),
            "learning_seconds": self._learning_seconds,
            "looks": state.looks,
            "learner": weights_hash(learner),
        }
        arm.finish(result, correct)
        self._together("an arm has ended")
        if self.lead:
            job.show()
        return result, correct


def branches(config: ArmConfig, origin: Path) -> list[tuple[str, Path]]:
    """(title, trigger's checkpoint) of each branch that an arm stands for, in order of rounds."""
    found = sorted((origin / "arms" / "practice" / "triggers").glob("step-*"), key=step_of)
    numbers = range(len(found)) if config.rounds is None else config.rounds
    return [(f"{config.title}-{n:03d}", found[n]) for n in numbers if n < len(found)]
