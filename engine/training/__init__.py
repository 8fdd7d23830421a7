"""Train an autoencoder or a latent diffusion model from a recipe: `etude train` ends up here.

`train` is one road for both kinds: open the data, build the model and its strategy, resume the
newest complete checkpoint, run the loop, write the result. What differs between the kinds is the
loss of a micro batch and what is looked at on the way: `autoencoder.py` and `diffusion.py`. A run
that starts from other weights takes them before its strategy takes the model: `origin.py`.
"""

import contextlib
import math
from pathlib import Path

from etude.core import distributed
from etude.core.checkpoint import disk_need, latest_checkpoint, load_checkpoint
from etude.core.log import Log
from etude.core.loop import run_loop
from etude.core.recipe import fingerprint
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.core.strategy import Strategy, build_strategy
from etude.kernels import announce

from .autoencoder import AutoencoderJob
from .diffusion import DiffusionJob
from .job import Job, Look
from .recipe import AutoencoderRecipe, LatentDiffusionRecipe, TrainRecipe

__all__ = ["AutoencoderRecipe", "LatentDiffusionRecipe", "Look", "TrainRecipe", "train"]

_JOBS: dict[str, type[Job]] = {"autoencoder": AutoencoderJob, "ldm": DiffusionJob}


def train(
    recipe: TrainRecipe, run: Run, *, stopper: Stopper, look: Look, world: distributed.World
) -> dict:
    """Run the recipe to its end, or to a stop that a later call resumes.

    Returns:
        The result written to `result.json`; `{"stopped": reason}` when it was told to stop.
    """
    with contextlib.closing(_JOBS[recipe.kind](recipe, run, look, world, stopper)) as job:
        return _train(job, run, stopper)


def _train(job: Job, run: Run, stopper: Stopper) -> dict:
    recipe, look, world, loop = job.recipe, job.look, job.world, job.recipe.loop
    newest = _newest(run, world)
    if newest is None:
        job.begin()
    strategy = build_strategy(
        recipe.strategy,
        job.model,
        recipe.optim,
        world,
        loop.accumulation(world.size),
        loop.micro_batch,
    )
    strategy = job.wrap(strategy)
    start, resumed = _resume(newest, strategy, job)
    facts = {"recipe": fingerprint(recipe), "start": str(start)} | job.inputs()
    distributed.all_agree(world, distributed.local_facts(**facts), run.folder)
    _announce(job, strategy, look.log)

    outcome = run_loop(
        config=loop,
        optim=recipe.optim,
        strategy=strategy,
        batches=lambda position: job.loader.batches(
            position, loop.global_batch, loop.micro_batch, world.rank, world.size
        ),
        losses=job.losses,
        world=world,
        log=look.log,
        checkpoints=run.checkpoints,
        stopper=stopper,
        start=start,
        resumed=resumed,
        extra=job.extra,
        evaluate=lambda images_seen: job.evaluate(strategy, images_seen),
    )
    if outcome.stopped:
        return {"stopped": outcome.stopped, "images_seen": outcome.images_seen}
    with strategy.weights(recipe.default_weights()) as model:
        result = job.finish(model) if world.rank == 0 else None
    result = distributed.exchange(world, "the result", result)[0]
    return {"images_seen": outcome.images_seen} | result


def _newest(run: Run, world: distributed.World) -> Path | None:
    """The newest complete checkpoint, as rank 0 found it."""
    found = latest_checkpoint(run.checkpoints) if world.rank == 0 else None
    name = distributed.exchange(world, "newest checkpoint", found and found.name)[0]
    return None if name is None else run.checkpoints / name


def _resume(newest: Path | None, strategy: Strategy, job: Job) -> tuple[int, dict]:
    """Load a checkpoint; where it stands and the loop's own notes in it."""
    log = job.look.log
    if newest is None:
        log.rewind(0)  # lines of a start that did not reach its first checkpoint
        return 0, {}
    # Rank 0 has just compared every hash.
    extra = load_checkpoint(newest, strategy, verify=False)
    job.check_inputs(extra)
    log.rewind(extra["images_seen"] + 1)
    log.info(f"resumed at {extra['images_seen']:,} of {job.recipe.loop.images:,} images")
    return extra["images_seen"], extra.get("loop", {})


def _announce(job: Job, strategy: Strategy, log: Log) -> None:
    recipe, world, loop = job.recipe, job.world, job.recipe.loop
    parameters = sum(math.prod(strategy.shapes[name]) for name in strategy.trainable)
    chosen = recipe.strategy
    means = "plain torch"
    if chosen.kind == "zero":
        means = f"ZeRO stage {1 if chosen.stage is None else chosen.stage}"
    log.info(
        f"{len(job.train_set):,} pictures, {parameters:,} parameters, {means} in "
        f"{chosen.precision}; global batch {loop.global_batch} = {world.size} rank(s) x "
        f"{loop.micro_batch} x {loop.accumulation(world.size)} accumulated"
    )
    for note in strategy.notes:
        log.info(note)
    log.info(job.loader_reason)
    log.info(announce(world.device.type))
    numbers = sum(math.prod(shape) for shape in strategy.inventory().values())
    log.info(disk_need(numbers, loop.checkpoint, loop.images).sentence)
