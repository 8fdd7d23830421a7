"""From a recipe to its result: what `etude.run`, every verb and every study job call.

Starts the world of processes, opens the run's folder, hands the recipe to the function of its kind
and writes `result.json`. A finished run returns its result at once, unless it is an evaluation; a
stopped one leaves `REQUEUE`.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.core import distributed
from etude.core.log import Log
from etude.core.recipe import Recipe, leaves, load_recipe
from etude.core.run import Run, folder_name
from etude.core.signals import Stopper, StopRequested

from .fetching import ensure_inputs
from .page import Page
from .training import Look, train
from .training.origin import resolved

_ON_ALL_RANKS = ("autoencoder", "evaluate", "extract", "ldm", "plan", "practice", "study")
PLACES_PER_JOB = 10  # sections that each job of a study has for itself on the shared page


@dataclass
class Desk:
    """What every kind of job is handed: its run, where it shows itself, when to stop."""

    run: Run
    look: Look
    stopper: Stopper
    world: distributed.World


def run(recipe: str, *overrides: str, name: str | None = None, **fields: Any) -> dict:
    """Run a recipe to its end, as `etude train`, `practice`, `extract` and `evaluate` do.

    Args:
        recipe: a shipped recipe's name ("ldm/digits") or the path of a YAML file.
        overrides: dotted fields as on the command line, "optim.lr=1e-4".
        name: the run folder's name under `runs/`; by default it is derived from the recipe.
        fields: overrides of top-level fields, `seed=1`.

    Returns:
        The result, as written to `result.json`.

    Raises:
        UserError: the recipe, its inputs or the machine do not fit; the message says what to type.
    """
    spelled = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in fields.items())]
    return run_recipe(load_recipe(recipe, spelled), name=name)[1]


def run_recipe(
    recipe: Recipe,
    *,
    name: str | None = None,
    root: Path = Path("runs"),
    resume_with_changes: bool = False,
    quiet: bool = False,
    world: distributed.World | None = None,
) -> tuple[Path, dict]:
    """Run a loaded recipe under signal handlers; returns its folder and result.

    Args:
        name, root, resume_with_changes: as for `Run.open`.
        world: the processes of this job, if they have been started already.
    """
    minutes = getattr(getattr(recipe, "loop", recipe), "max_minutes", None)
    world = world or distributed.start()
    with Stopper(max_minutes=minutes, watch_parent=world.size > 1) as stopper:
        return _run(
            recipe,
            world,
            stopper,
            root,
            name=name,
            resume_with_changes=resume_with_changes,
            quiet=quiet,
        )


def _run(
    recipe: Recipe,
    world: distributed.World,
    stopper: Stopper,
    root: Path,
    *,
    name: str | None = None,
    resume_with_changes: bool = False,
    quiet: bool = False,
    page: Page | None = None,
    order: int = 0,
    label: str = "",
) -> tuple[Path, dict]:
    lead = world.rank == 0
    recipe = resolved(recipe)
    if world.size > 1:  # before any wait: a rank with another recipe opens another folder
        fields = {".".join(map(str, path)): repr(value) for path, value, _ in leaves(recipe)}
        distributed.all_agree(world, distributed.local_facts(**fields))
    with Run.open(
        recipe, root=root, name=name, resume_with_changes=resume_with_changes, rank=world.rank
    ) as opened:
        distributed.barrier(world, "the run's folder")
        finished = opened.finished()
        if finished is not None and _is_over(recipe):
            return opened.folder, finished
        log = Log(opened.folder, rank=world.rank, quiet=quiet)
        if lead:
            ensure_inputs(recipe, log)
        distributed.barrier(world, "the input files")
        own_page = page is None and lead
        if own_page:
            page = Page(opened.folder, recipe.name, recipe.description)
            page.state("running")
        desk = Desk(opened, Look(log, page, order, label), stopper, world)
        state = "failed"
        try:
            result = _work(recipe, desk)
            state = "stopped" if "stopped" in result else "finished"
        finally:
            log.close()
            if own_page:
                page.state(state)
                page.write()
        if state == "stopped":
            opened.request_requeue(result["stopped"], result.get("images_seen", 0))
        else:
            opened.finish(result)
        return opened.folder, result


def _is_over(recipe: Recipe) -> bool:
    """Whether a finished run stays as it is: the recipes of a study's jobs may have changed, and
    pictures and checkpoints that are evaluated; these kinds make nothing again that is there.
    """
    return recipe.kind not in ("study", "plan", "evaluate", "extract")


def _work(recipe: Recipe, desk: Desk) -> dict:
    """The result of a job; kinds that are not made for several processes run on rank 0 alone."""
    work = _RUNNERS[recipe.kind]
    try:
        if recipe.kind in _ON_ALL_RANKS:
            return work(recipe, desk)
        return distributed.on_first(desk.world, f"{recipe.kind} on rank 0", work, recipe, desk)
    except StopRequested as reason:
        return {"stopped": str(reason)}


def _train(recipe: Recipe, desk: Desk) -> dict:
    return train(recipe, desk.run, stopper=desk.stopper, look=desk.look, world=desk.world)


def _judge(recipe: Recipe, desk: Desk) -> dict:
    from etude.evaluation.judge import run_judge

    with _stopping_anywhere(desk):
        return run_judge(recipe, desk.run, desk.look.log)


def _practice(recipe: Recipe, desk: Desk) -> dict:
    from .practising import run_practice
    from .showing import show_practice

    result = run_practice(
        recipe,
        desk.run,
        desk.look.log,
        desk.stopper,
        desk.world,
        lambda: show_practice(desk.run.folder, desk.look),
    )
    if "arms" not in result:  # stopped, or a process that only draws
        return result
    accuracies = {f"{n} accuracy": arm["test_accuracy"] for n, arm in result["arms"].items()}
    return {"headline": accuracies} | result


def _theory(recipe: Recipe, desk: Desk) -> dict:
    from etude.practice.theory_report import report

    from .showing import show_theory

    with _stopping_anywhere(desk):
        result = report(
            recipe,
            desk.run.folder,
            desk.look.log,
            lambda figures: show_theory(recipe, figures, desk.look),
        )
    return {"headline": {"p of the check": result["p"]}} | result


def _evaluate(recipe: Recipe, desk: Desk) -> dict:
    from etude.evaluation import plan

    from .sampling import open_generator
    from .showing import show_evaluation

    generator = None
    if recipe.generator:
        generator = open_generator(
            recipe.generator,
            weights=recipe.weights,
            sampler=recipe.sampler,
            device=desk.world.device,
        )
    with _stopping_anywhere(desk):
        with_all = {"generator": generator, "log": desk.look.log, "world": desk.world}
        if recipe.kind == "extract":
            return plan.extract(recipe, desk.run, **with_all)
        result = plan.evaluate(recipe, desk.run, **with_all)
    if desk.world.rank == 0:
        show_evaluation(result, desk.look)
    figures = {name: by_pair["generated"]["value"] for name, by_pair in result["figures"].items()}
    if "labels" in result:
        figures |= {"labelled as asked": result["labels"]["agreement"]["value"]}
    return {"headline": figures} | result


def _plan(recipe: Recipe, desk: Desk) -> dict:
    from .planning import run_plan

    with _stopping_anywhere(desk):
        return run_plan(recipe, desk.run, desk.look.log, desk.world, desk.look)


@contextlib.contextmanager
def _stopping_anywhere(desk: Desk) -> Iterator[None]:
    """For jobs whose work may end at any point: every progress looks whether to stop."""
    desk.look.log.on_advance = desk.stopper.check
    try:
        yield
    finally:
        desk.look.log.on_advance = None


def _study(recipe: Recipe, desk: Desk) -> dict:
    from .study import run_study, summary, table, write_csv

    root = desk.run.folder.parent

    def run_job(job: str, overrides: list[str], place: int, label: str) -> tuple[Path, dict]:
        loaded = load_recipe(job, overrides)
        if desk.stopper.requested:
            return root / folder_name(loaded), {"stopped": desk.stopper.requested}
        order = desk.look.order + PLACES_PER_JOB * (place + 1)
        if desk.world.rank == 0:
            desk.look.page.state("running", detail=loaded.name)
            desk.look.page.write()
        return _run(
            loaded, desk.world, desk.stopper, root, page=desk.look.page, order=order, label=label
        )

    def show(results: dict[str, dict]) -> None:
        if desk.world.rank == 0:
            write_csv(desk.run.folder / "table.csv", *table(results))
            title = recipe.description or recipe.name
            desk.look.page.table("study", title, *summary(results), order=desk.look.order)
            desk.look.page.write()

    return run_study(recipe, run_job=run_job, show=show)


_RUNNERS: dict[str, Callable[[Recipe, Desk], dict]] = {
    "autoencoder": _train,
    "ldm": _train,
    "judge": _judge,
    "practice": _practice,
    "theory": _theory,
    "extract": _evaluate,
    "evaluate": _evaluate,
    "plan": _plan,
    "study": _study,
}
