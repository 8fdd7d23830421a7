"""`checkpoint_writer.py kills|faults FOLDER`: forks writers, kills or breaks them, prints JSON.

The state is a function of `images_seen`, so what is loaded can be checked without a second copy.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from etude.core import checkpoint, distributed
from etude.core.errors import UserError
from etude.core.optim import OptimConfig
from etude.core.strategy import StrategyConfig, build_strategy

WORLD = distributed.start()
KEEP = checkpoint.CheckpointConfig(keep_last=2)


def strategy_at(images_seen: int, width: int):
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3))
    strategy = build_strategy(StrategyConfig(kind="local"), model, OptimConfig(), WORLD)
    for view in strategy.views():
        view.data.fill_(images_seen)
    return strategy


def save(strategy, images_seen: int, folder: Path) -> None:
    for view in strategy.views():
        view.data.fill_(images_seen)
    checkpoint.save_checkpoint(folder, images_seen, strategy, {"turn": images_seen}, WORLD)
    checkpoint.prune_checkpoints(folder, KEEP)


def loaded(folder: Path, into) -> int:
    """images_seen of the newest complete checkpoint after checking every element; 0 for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a published checkpoint is never broken
        path = checkpoint.latest_checkpoint(folder)
    if path is None:
        return 0
    extra = checkpoint.load_checkpoint(path, into, verify=False)
    values = {value for view in into.views() for value in view.data.unique().tolist()}
    assert values == {float(extra["turn"])} and extra["turn"] == extra["images_seen"], (path, extra)
    return extra["turn"]


def kills(folder: Path, count: int) -> dict:
    chance = random.Random(0)
    writer, reader = strategy_at(0, 200), strategy_at(0, 200)
    newest, caught = 0, 0
    for _ in range(count):
        child = os.fork()
        if child == 0:
            step = newest
            while True:
                step += 1
                save(writer, step, folder)
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        caught += any(folder.glob(".*step-*"))
        found = loaded(folder, reader)
        assert found >= newest, (found, newest)
        newest = found
    return {"newest": newest, "caught in the act": caught, "kills": count}


class Faulty:
    """Counts every write, fsync and rename; at the chosen one fails or dies half-way."""

    def __init__(self, at: int, dies: bool) -> None:
        self.at, self.dies, self.count = at, dies, 0
        self.real = (checkpoint.write_chunk, os.fsync, os.rename)
        checkpoint.write_chunk, os.fsync, os.rename = self.write, self.fsync, self.rename

    def restore(self) -> None:
        checkpoint.write_chunk, os.fsync, os.rename = self.real

    def due(self) -> bool:
        self.count += 1
        return self.count == self.at

    def fail(self) -> None:
        if self.dies:
            os._exit(9)
        raise OSError(28, "No space left on device")

    def write(self, file, chunk) -> None:
        if self.due():
            file.write(chunk[: len(chunk) // 2])
            file.flush()
            self.fail()
        self.real[0](file, chunk)

    def fsync(self, descriptor) -> None:
        if self.due():
            self.fail()
        self.real[1](descriptor)

    def rename(self, old, new) -> None:
        if self.due():
            self.fail()
        self.real[2](old, new)


def faults(folder: Path) -> dict:
    writer, reader = strategy_at(0, 20), strategy_at(0, 20)
    counter = Faulty(-1, False)
    save(writer, 1, folder / "count")
    save(writer, 1, folder / "count")
    counter.restore()
    tried = 0
    for dies in (False, True):
        for at in range(1, counter.count + 1):
            here = folder / f"{dies}-{at}"
            save(writer, 1, here)
            child = os.fork()
            if child == 0:
                faulty = Faulty(at, dies)
                try:
                    save(writer, 2, here)
                    save(writer, 2, here)
                except (OSError, UserError):
                    faulty.restore()
                    newest = loaded(here, reader)
                    save(writer, newest + 1, here)  # the same process can go on
                    os._exit(0 if loaded(here, reader) == newest + 1 else 7)
                os._exit(8)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == (9 if dies else 0), (at, dies, code)
            newest = loaded(here, reader)
            assert newest >= 1
            save(writer, newest + 1, here)
            assert loaded(here, reader) == newest + 1
            hidden = [p.name for p in here.iterdir() if p.name.startswith(".")]
            assert not hidden, hidden
            tried += 1
    return {"faults": tried, "operations": counter.count}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    print(json.dumps(kills(out, int(sys.argv[3])) if sys.argv[1] == "kills" else faults(out)))
