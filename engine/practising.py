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
from etude.core.log import Log
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.diffusion.samplers import SamplerConfig
from etude.practice.pictures import load_split
from etude.practice.rebuild import Rebuilt, open_origin, rebuild
from etude.practice.recipe import PracticeRecipe
from etude.practice.rounds import Drawing, practise
from etude.practice.supply import CLOSED, Facts, Studio, attend

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

    pools = run.folder / "pools"
    learners = world.size - recipe.generators if apart else world.size
    draws = not apart or world.rank >= learners
    if apart and world.rank == 0:
        (pools / CLOSED).unlink(missing_ok=True)
    generator = opened() if draws else None
    facts = asdict(Facts.of(generator)) if generator is not None else None
    if apart:
        facts = distributed.exchange(world, "the generator", facts, distributed.FOREVER_S)[-1]
        crew = distributed.part(world, learners)
        if generator is not None:
            studio = Studio(lambda: generator, recipe.learner, pools, world.device)
            return attend(studio, world.rank - learners, lambda: stopper.requested)
    else:
        crew = world
    assert facts is not None
    return practise(
        recipe,
        run,
        Drawing(Facts(**facts), opened if generator is None else lambda: generator, apart, origin),
        log,
        stopper,
        world=crew,
        judge=_judge(recipe, world.device) if world.rank == 0 else None,
        show=show,
    )


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


def _judge(recipe: PracticeRecipe, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    if not recipe.judge:
        return None
    from etude.evaluation.judge import open_judge

    return open_judge(recipe.judge, device).logits
