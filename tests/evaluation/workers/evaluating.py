"""One process of an evaluation, alone or of several (see the environment), that may die on the way.

    evaluating.py extract NETWORK STORE READ   150 pictures by two extractors; each range of them
                                               that is read is a line of the file READ/<rank>
    evaluating.py plan PLAN.yaml ROOT [NAME]   a plan, whose run is made below ROOT

In the environment: DIE_AT=n kills the process at its n-th rename, before it where n is odd and
after it where n is even; AHEAD=1 lets rank 1 write the first shard as another job would, between
the looks of the two processes at the store; PAUSE=seconds before each reading; WRONG=r lets rank
r find a picture that cannot be read.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from etude.core import distributed
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import load_recipe
from etude.core.run import Run
from etude.core.signals import EXIT_REQUEUE, Stopper, StopRequested
from etude.evaluation.extract import extract_set, feature_key
from etude.evaluation.planned.running import Plan
from etude.evaluation.sets import Pictures, Stages
from etude.metrics.extractors import Extractor
from etude.metrics.store import FeatureStore

COUNT, SHARD, BATCH = 150, 16, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12, 3), dtype=np.uint8)


class Noted:
    """Random pictures that note what is read of them, a line a reading."""

    name, fingerprint, classes, protocol = "noted", "noted", [], {}

    def __init__(self, read: Path, rank: int) -> None:
        self.file = read / str(rank)
        self.file.touch()

    def __len__(self) -> int:
        return COUNT

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        time.sleep(float(os.environ.get("PAUSE", 0)))
        if os.environ.get("WRONG") == self.file.name:
            raise UserError(f"picture {start} cannot be used")
        with self.file.open("a") as file:
            file.write(f"{start} {stop}\n")
        keys = [f"{i:03d}" for i in range(start, stop)]
        groups = ["even" if i % 2 == 0 else "odd" for i in range(start, stop)]
        return Pictures(IMAGES[start:stop], keys, np.arange(start, stop) % 3, groups)


def extract(network: str, store: str, read: str, world: distributed.World) -> None:
    pair = [Extractor("pixels", input_size=6), Extractor("classifier", network)]
    pictures, kept = Noted(Path(read), world.rank), FeatureStore(store)
    if os.environ.get("AHEAD") and world.rank == 1:
        write_ahead(pictures, pair, kept)
    log = Log(None, quiet=True)
    with Stopper(watch_parent=world.size > 1) as stopper:
        log.on_advance = stopper.check
        options = {"batch_size": BATCH, "shard_size": SHARD, "log": log}
        rates = extract_set(pictures, pair, kept, **options, world=world)
    assert not rates or {"forward", "all"} <= rates.keys()


def write_ahead(pictures: Noted, pair: list[Extractor], store: FeatureStore) -> None:
    entries = [feature_key(pictures, one) for one in pair]
    while not all((store.folder / (d := key.digest())[:2] / d).exists() for key in entries):
        time.sleep(0.01)
    block = pictures.read(0, SHARD, Stages())
    labels = torch.from_numpy(block.labels)
    for one, key in zip(pair, entries, strict=True):
        parts = [one(block.images[i : i + BATCH]) for i in range(0, SHARD, BATCH)]
        features = torch.cat(parts)
        store.writer(key, SHARD).write(0, features, block.keys, labels, block.groups)


def plan(path: str, root: str, world: distributed.World, name: str | None = None) -> None:
    recipe = load_recipe(path)
    with Run.open(recipe, root=Path(root), name=name, rank=world.rank) as run:
        distributed.barrier(world, "the run's folder")
        log = Log(run.folder, rank=world.rank, quiet=True)
        with Stopper(watch_parent=world.size > 1) as stopper:
            log.on_advance = stopper.check
            Plan(recipe, run, log, world).run()


def die_at(number: int) -> None:
    """SIGKILL where a file gets its name: nothing is cleaned up, as when memory ran out."""
    done = 0

    def counted(names: Callable) -> Callable:
        def name(*paths: Path) -> None:
            nonlocal done
            done += 1
            if done == number and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            names(*paths)
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

        return name

    os.replace, os.link = counted(os.replace), counted(os.link)


def main(verb: str, *words: str) -> None:
    world = distributed.start()
    if os.environ.get("DIE_AT") and world.rank == int(os.environ.get("DIES", 0)):
        die_at(int(os.environ["DIE_AT"]))
    try:
        extract(*words, world=world) if verb == "extract" else plan(*words[:2], world, *words[2:])
    except StopRequested as reason:
        print("stopped:", reason)
        raise SystemExit(EXIT_REQUEUE) from None
    except UserError as error:
        print(error)
        raise SystemExit(2) from None
    if world.size > 1:
        distributed.stop(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
