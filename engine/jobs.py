"""From a recipe to its result: what `etude.run`, every verb and every study job call.

Opens the run folder, starts the processes' world, hands the recipe to the function of its kind and
writes `result.json`. A finished run returns its result at once; a stopped one leaves `REQUEUE`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from etude.core import distributed
from etude.core.log import Log
from etude.core.recipe import Recipe, load_recipe
from etude.core.run import Run
from etude.core.signals import Stopper

from .fetching import ensure_inputs
from .page import Page
from .sampling import open_generator
from .training import Look, train

SECTIONS_PER_JOB = 10  # places on a shared page that each job of a study has for itself


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
    spelled = [*overrides, *(f"{key}={_spell(value)}" for key, value in fields.items())]
    return run_recipe(load_recipe(recipe, spelled), name=name)[1]


def _spell(value: Any) -> str:
    import json

    return json.dumps(value)


def run_recipe(
    recipe: Recipe,
    *,
    name: str | None = None,
    root: Path = Path("runs"),
    page: Page | None = None,
    order: int = 0,
    stopper: Stopper | None = None,
) -> tuple[Path, dict]:
    """Run a loaded recipe; returns its folder and result.

    Args:
        page: a study's shared page; by default the run has a page of its own.
        order: the job's first place on the page.
        stopper: shared by the jobs of a study; by default signals are watched while this job runs.
    """
    if stopper is None:
        minutes = getattr(getattr(recipe, "loop", None), "max_minutes", None)
        with Stopper(max_minutes=minutes) as own:
            return run_recipe(
                recipe, name=name, root=root, page=page, order=order, stopper=own
            )
    world = distributed.start()
    with Run.open(recipe, root=root, name=name, rank=world.rank) as folder:
        finished = folder.finished()
        if finished is not None:
            return folder.folder, finished
        log = Log(folder.folder, rank=world.rank)
        page = page or Page(folder.folder, recipe.name, recipe.description)
        if world.rank == 0:
            ensure_inputs(recipe, log)
        distributed.barrier(world, "the input files")
        folder.clear_requeue()
        look = Look(log, page, order)
        result = _RUNNERS[recipe.kind](recipe, folder, look, stopper, world)
        if "stopped" in result:
            folder.request_requeue(result["stopped"])
        elif world.rank == 0:
            folder.finish(result)
        return folder.folder, result


def _train(recipe: Recipe, folder: Run, look: Look, stopper: Stopper, world) -> dict:
    return train(recipe, folder, stopper=stopper, look=look, world=world)


def _judge(recipe: Recipe, folder: Run, look: Look, stopper: Stopper, world) -> dict:
    from etude.evaluation.judge import train_judge

    return train_judge(recipe, folder, log=look.log)


def _practice(recipe: Recipe, folder: Run, look: Look, stopper: Stopper, world) -> dict:
    from etude.practice.rounds import practise

    generator = open_generator(
        recipe.generator, weights=recipe.weights, sampler=recipe.sampler, device=world.device
    )
    result = practise(recipe, folder, generator, look.log, stopper)
    return result


def _evaluate(recipe: Recipe, folder: Run, look: Look, stopper: Stopper, world) -> dict:
    from etude.evaluation import plan

    generator = None
    if recipe.generator:
        generator = open_generator(recipe.generator, weights=recipe.weights, device=world.device)
    act = plan.extract if recipe.kind == "extract" else plan.evaluate
    return act(recipe, folder, generator=generator, log=look.log)


def _study(recipe: Recipe, folder: Run, look: Look, stopper: Stopper, world) -> dict:
    from .study import run_study

    def run_job(name: str, overrides: list[str], place: int) -> tuple[Path, dict]:
        return run_recipe(
            load_recipe(name, overrides),
            root=folder.folder.parent,
            page=look.page,
            order=look.order + SECTIONS_PER_JOB * (place + 1),
            stopper=stopper,
        )

    def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
        if world.rank == 0:
            look.page.table("study", title, columns, rows, order=look.order)
            look.page.write()

    return run_study(recipe, folder.folder, run_job=run_job, show=show)


_RUNNERS: dict[str, Callable] = {
    "autoencoder": _train,
    "ldm": _train,
    "judge": _judge,
    "practice": _practice,
    "extract": _evaluate,
    "evaluate": _evaluate,
    "study": _study,
}
