"""Launchers that are killed leave their ranks behind: these notice, save and leave by themselves.

SIGKILL of the real launcher, while its ranks train a recipe that does not end. What the launcher
gave them, a pipe to print to and torchrun's store, is gone with it.
"""

import json
import os

import pytest

from etude.core.checkpoint import latest_checkpoint

pytestmark = pytest.mark.timeout(240)


def kill_and_watch(bench, wait_until, command: list) -> None:
    """Start, wait for three steps, kill; then a checkpoint, REQUEUE and no process must be left."""
    reader, writer = os.pipe()
    process = bench.start(*command, bench.endless, "run=endless", stdout=writer)
    os.close(writer)
    metrics = bench.folder / "runs/endless/metrics.jsonl"
    try:
        wait_until(
            lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 120, "three steps"
        )
    finally:
        os.close(reader)  # like a terminal or an ssh connection that is gone
    process.kill()
    process.wait()
    assert bench.ranks(), "the ranks died with the launcher: nothing is tested"
    wait_until(lambda: not bench.ranks(), 60, "the ranks left")
    run = bench.folder / "runs/endless"
    asked = json.loads((run / "REQUEUE").read_text())
    assert asked["reason"] == "the launcher is gone" and asked["images_seen"] >= 48
    saved = latest_checkpoint(run / "checkpoints")
    assert saved is not None and saved.name == f"step-{asked['images_seen']:012d}"
    assert not (run / "lock.json").exists() and not (run / "result.json").exists()


def test_deepspeed(bench, wait_until, free_port) -> None:
    """`deepspeed` starts a launcher per machine, which starts the ranks and outlives it."""
    command = ["deepspeed", "--num_gpus=2", f"--master_port={free_port}", "--module"]
    kill_and_watch(bench, wait_until, [*command, "etude", "train"])


def test_torchrun(bench, wait_until) -> None:
    """torchrun is the ranks' parent, and holds the store through which they agree: it must not be
    needed to save."""
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "etude", "train"]
    kill_and_watch(bench, wait_until, command)
