"""The job of a practice recipe: who learns, who draws, and with which generator.

Called by jobs.py in every process. With `placement: interleaved` all processes learn, and draw a
round together when one is asked for. With `separate` the last `generators` of them only draw: they
serve what the others ask for through the pools' folder, which all of them see, and stand in for
each other; should none of them be left, the learners draw for themselves.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.core import distributed
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.files import write_json_atomic
from etude.core.log import Log
from etude.core.run import Run
from etude.core.signals import Stopper, StopRequested
from etude.diffusion.samplers import SamplerConfig
from etude.practice.pictures import load_split
from etude.practice.rebuild import Rebuilt, open_origin, rebuild
from etude.practice.recipe import PracticeRecipe
from etude.practice.rounds import Drawing, practise
from etude.practice.supply import CLOSED, Attendance, Facts, Studio, attend, attending

from .sampling import Generator, open_generator
from .stable_diffusion import class_names, is_stable_diffusion


def run_practice(
    recipe: PracticeRecipe,
    run: Run,
    log: Log,
    stopper: Stopper,
    world: World,
    show: Callable[[], None],
) -> dict[str, Any]:
    """Learn, or draw for those who do; the result is complete in rank 0.

    Raises:
        UserError: the recipe names no generator, or the processes do not suffice for its placement.
    """
    if not recipe.generator:
        raise UserError(
            f"recipe {recipe.name} names no generator: add generator=RUN (`etude runs list`)"
        )
    apart = recipe.placement == "separate"
    if apart and world.size <= recipe.generators:
        raise UserError(
            f"placement=separate with generators={recipe.generators} needs at least "
            f"{recipe.generators + 1} processes, and there are {world.size}: start more, or type "
            "placement=interleaved"
        )
    origin = _origin(recipe)

    def opened() -> Generator:
        return open_from(origin, world.device)

    if apart:
        return _run_apart(recipe, run, log, stopper, world, show, origin, opened)
    generator = opened()
    generator.cheap_decoder(recipe.guidance)  # a folder that does not fit is refused at once
    drawing = Drawing(Facts.of(generator), lambda: generator, origin=origin)
    judge = _judge(recipe, world)
    return practise(recipe, run, drawing, log, stopper, world=world, judge=judge, show=show)


def _run_apart(
    recipe: PracticeRecipe,
    run: Run,
    log: Log,
    stopper: Stopper,
    world: World,
    show: Callable[[], None],
    origin: dict[str, Any],
    opened: Callable[[], Generator],
) -> dict[str, Any]:
    """The last processes draw, the others learn; a result names those that were lost meanwhile."""
    pools, learners = run.folder / "pools", world.size - recipe.generators
    if world.rank == 0:
        (pools / CLOSED).unlink(missing_ok=True)
    if world.rank >= learners:
        number = world.rank - learners
        with Attendance(pools, number):
            generator = opened()
            generator.cheap_decoder(recipe.guidance)
            _facts(world, generator)
            distributed.part(world, learners)
            studio = Studio(lambda: generator, recipe.learner, pools, world.device)
            return attend(studio, number, lambda: stopper.requested)
    facts = _facts(world, None)
    crew = distributed.part(world, learners)
    closing: dict[str, Any] = {"stopped": None, "failed": "look at rank 0's own output"}
    try:
        drawing = Drawing(facts, opened, apart=True, origin=origin)
        judge = _judge(recipe, world)
        result = practise(recipe, run, drawing, log, stopper, world=crew, judge=judge, show=show)
        closing = {"stopped": result.get("stopped"), "failed": None}
        lost = set(range(recipe.generators)) - attending(pools)
        return result | ({"lost": sorted(learners + number for number in lost)} if lost else {})
    except StopRequested as reason:
        closing = {"stopped": str(reason), "failed": None}
        raise
    finally:
        if world.rank == 0:
            write_json_atomic(pools / CLOSED, closing)


def _facts(world: World, generator: Generator | None) -> Facts:
    """What the processes that draw tell the others of their generator."""
    own = asdict(Facts.of(generator)) if generator is not None else None
    return Facts(**distributed.exchange(world, "the generator", own, distributed.FOREVER_S)[-1])


def _origin(recipe: PracticeRecipe) -> dict[str, Any]:
    """How the recipe's generator is opened, as JSON; see `open_from`."""
    classes: list[str] = []
    if is_stable_diffusion(recipe.generator):
        held: list[str] = []
        if not recipe.classes and recipe.monitor:
            held = load_split(recipe.monitor, recipe.pictures, cache_bytes=0).class_names
        classes = class_names(recipe.generator, recipe.classes, held, recipe.monitor)
    return {
        "generator": recipe.generator,
        "weights": recipe.weights,
        "sampler": recipe.sampler.model_dump(mode="json"),
        "classes": classes,
        "prompt": recipe.prompt,
    }


def open_from(origin: dict[str, Any], device: torch.device, generator: str = "") -> Generator:
    """The generator that a pool's pictures came from.

    Args:
        origin: what `run_practice` noted.
        generator: where it lies now, if it was moved.
    """
    where = generator or origin["generator"]
    found = open_generator(
        where,
        weights=origin["weights"],
        sampler=SamplerConfig.model_validate(origin["sampler"]),
        device=device,
        classes=origin["classes"],
        prompt=origin["prompt"],
    )
    if found.asked_by_text:
        raise UserError(
            f"practice needs labels, but {found.name} is asked by text: set generator to a run"
            " asked by class, or to a Stable Diffusion folder"
        )
    return found


def rebuild_pool(pool: Path, to: Path, generator: str, log: Log) -> Rebuilt:
    """Draw a pool's pictures again; see `practice/rebuild.py`.

    Args:
        generator: where it lies; "" where the pool says.
    """
    device = distributed.start().device
    opened = open_origin(pool)["opened"]
    if opened is None:
        raise UserError(
            f"{pool} was drawn by a generator that a program handed over: call "
            "etude.practice.rebuild.rebuild with it"
        )
    return rebuild(pool, to, lambda: open_from(opened, device, generator), device, log)


def _judge(recipe: PracticeRecipe, world: World) -> Callable[[Tensor], Tensor] | None:
    if not recipe.judge or world.rank:
        return None
    from etude.evaluation.judge import open_judge

    return open_judge(recipe.judge, world.device).logits
