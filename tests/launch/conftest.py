"""One tiny job for every launcher: digits in pixels by a small DiT, five steps in float32."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from etude.core.log import read_metrics
from etude.core.recipe import load_recipe
from etude.data.digits import write_digits
from etude.jobs import run_recipe

STEPS, GLOBAL_BATCH = 5, 16
PROGRAMS = Path(sys.executable).parent  # torchrun, deepspeed
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH", "ETUDE_START_SECONDS")
RECIPE = """\
kind: ldm
data:
  shards: {digits}/train
  augment: {{image_size: 8, crop: random, scale: [0.7, 1.0], channels: 1}}
  decoder: torch
  workers: 1
held_out: {digits}/monitor
model: {{input_size: 8, in_channels: 1, patch_size: 2, hidden_size: 48, depth: 2, num_heads: 4,
  num_classes: 10, learn_sigma: false}}
optim: {{lr: 1.0e-3, warmup_images: 16, clip: 1.0, ema: [0.99]}}
strategy: {{kind: local}}
loop:
  images: {images}
  global_batch: {batch}
  micro_batch: {micro}
  log_every: {batch}
  evaluate_every: 1000000000
  checkpoint: {{every_images: 1000000000}}
sampler: {{method: heun, steps: 2, guidance_convention: lambda}}
grid: {{per_class: 1, max_classes: 2}}
"""


@dataclass
class Bench:
    """A folder to run in, the tiny recipe, one that does not end, and what was started there."""

    folder: Path
    recipe: Path
    endless: Path
    started: list[subprocess.Popen] = field(default_factory=list)
    forked: list = field(default_factory=list)  # whose command line does not name the folder

    @classmethod
    def make(cls, folder: Path, digits: Path) -> "Bench":
        made = cls(folder, folder / "tiny.yaml", folder / "endless.yaml")
        values = {"digits": digits, "batch": GLOBAL_BATCH, "micro": GLOBAL_BATCH // 2}
        made.recipe.write_text(RECIPE.format(images=STEPS * GLOBAL_BATCH, **values))
        made.endless.write_text(RECIPE.format(images=10**8, **values))
        return made

    def start(
        self, *command: str | Path, stdout: int = subprocess.PIPE, **variables: str
    ) -> subprocess.Popen:
        """Start a command in the folder with the environment of a job on the CPU."""
        inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        environment = inherited | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", **variables}
        process = subprocess.Popen(
            [str(word) for word in command], cwd=self.folder, env=environment, stdout=stdout,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def finish(self, *command: str | Path, **variables: str) -> tuple[int, str]:
        """Run a command to its end: exit status, and all that its ranks printed."""
        process = self.start(*command, **variables)
        output = process.communicate(timeout=150)[0]
        return process.returncode, output

    def ranks(self) -> list[int]:
        """Live processes that run a recipe of this folder, launchers among them."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if str(self.folder).encode() in words and b"etude" in words:
                    found.append(int(entry.name))
        return found

    def clean(self) -> None:
        """End what is left, orphans included."""
        for process in self.forked:
            process.kill()
        for process in [*self.ranks(), *(p.pid for p in self.started if p.poll() is None)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in self.started:
            process.wait()

    def losses(self, name: str) -> list[float]:
        """The training losses that a run wrote: one line per step, in order."""
        rows = read_metrics(self.folder / "runs" / name / "metrics.jsonl", "train")
        seen = [row["images_seen"] for row in rows]
        assert seen == [GLOBAL_BATCH * (step + 1) for step in range(len(rows))]
        return [row["loss"] for row in rows]

    def check(self, name: str, output: str, expected: list[float]) -> None:
        """A finished run of several ranks: one rank's losses, and rank 0 alone spoke and wrote."""
        folder = self.folder / "runs" / name
        assert (folder / "result.json").exists(), output
        assert self.losses(name) == pytest.approx(expected, rel=1e-5), output
        assert output.count(f"page runs/{name}/page.html") == 1, output
        assert output.count("training: 80/80 images") == 1, output
        assert (folder / "log.txt").read_text().count("2 rank(s)") == 1
        assert "Training and held-out loss" in (folder / "page.html").read_text()
        assert json.loads((folder / "environment.json").read_text())["earlier_starts"] == []
        written = {path.name for path in folder.iterdir()}
        assert not written & {"log-rank1.txt", "lock.json", "REQUEUE"}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def bench(tmp_path: Path, digits: Path) -> Iterator[Bench]:
    made = Bench.make(tmp_path, digits)
    yield made
    made.clean()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[float]:
    """The losses of the recipe in this process, alone, with plain torch."""
    alone = Bench.make(tmp_path_factory.mktemp("one"), digits)
    run_recipe(load_recipe(alone.recipe), root=alone.folder / "runs", name="one", quiet=True)
    losses = alone.losses("one")
    assert len(losses) == STEPS and len(set(losses)) == STEPS
    return losses


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Poll until something is true, with a limit."""

    def wait(done: Callable[[], object], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            time.sleep(0.1)

    return wait


@pytest.fixture
def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
