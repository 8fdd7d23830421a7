"""Training end to end on real digits: resume, ranks, kills, stops and values that are not finite.

Runs are real: processes of their own wherever a signal, a kill or a second rank is part of it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.core import distributed
from etude.core.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from etude.core.errors import UserError
from etude.core.log import Log, read_metrics
from etude.core.recipe import fingerprint, load_recipe
from etude.core.run import Run
from etude.core.signals import EXIT_REQUEUE, Stopper
from etude.core.strategy import build_strategy
from etude.jobs import run_recipe
from etude.models.dit import DiT
from etude.page import Page
from etude.replay import replay
from etude.training import Look
from etude.training.diffusion import DiffusionJob

ALONE = distributed.World(0, 1, 0, torch.device("cpu"), ("here:cpu",))
LONG = ["loop.images=1280", "loop.evaluate_every=640", "loop.checkpoint.every_images=160"]
LONG += ["loop.log_every=48"]
ZERO = ["strategy.kind=zero", "strategy.stage=1"]
TIMES = ("time", "images_per_second", "data_wait_percent")


def command(*arguments: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(launcher if ranks > 1 else []), "-m", "etude", *arguments]


def start(folder: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments, ranks=ranks),
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{process.args}\n{out[-2000:]}{err[-4000:]}"
    return out


def wait_for(process: subprocess.Popen, condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            out, err = process.communicate(timeout=10)
            raise AssertionError(f"{process.returncode}\n{out[-2000:]}{err[-4000:]}")
        time.sleep(0.01)


def logged(run: Path) -> int:
    """The largest images_seen that the run has logged."""
    return max((row["images_seen"] for row in read_metrics(run / "metrics.jsonl")), default=0)


def stop(process: subprocess.Popen, number: int = signal.SIGTERM) -> str:
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, f"{process.returncode}\n{out}{err[-4000:]}"
    return out


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and everything below it, ranks first so that none can save."""
    below = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, below), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def state(run: Path) -> tuple[dict, dict]:
    """Every tensor of the newest checkpoint by (name, state), and its extra."""
    newest = max((run / "checkpoints").glob("step-*"))
    with verify_checkpoint(newest) as found:
        keys = [(t["name"], t["state"]) for t in found.manifest["tensors"]]
        tensors = {k: found.read(*k, 0, int(np.prod(found.shape(*k)))) for k in keys}
        return tensors, found.manifest["extra"]


def metrics(run: Path) -> list[dict]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def page(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "page").iterdir()}


def losses(run: Path) -> dict[int, float]:
    return {r["images_seen"]: r["loss"] for r in read_metrics(run / "metrics.jsonl", "train")}


@pytest.mark.parametrize("strategy", [["strategy.kind=local"], ZERO], ids=["local", "zero1"])
def test_a_stopped_and_a_killed_run_resume_to_the_same_bits(tiny, tmp_path, strategy) -> None:
    arguments = ["train", tiny.ldm, *LONG, *strategy]
    straight = start(tmp_path, *arguments, "run=straight")
    parted = start(tmp_path, *arguments, "run=parted")
    folder = tmp_path / "runs" / "parted"
    wait_for(parted, lambda: logged(folder) > 0)
    assert "type the same command to go on" in stop(parted)
    asked = json.loads((folder / "REQUEUE").read_text())
    assert asked["reason"] == "SIGTERM" and 0 < asked["images_seen"] < 1280
    assert not (folder / "result.json").exists()

    parted = start(tmp_path, *arguments, "run=parted")
    wait_for(parted, lambda: logged(folder) >= asked["images_seen"] + 200)
    kill(parted)
    finish(start(tmp_path, *arguments, "run=parted"))
    finish(straight)

    assert not (folder / "REQUEUE").exists()
    (one, extra_one), (two, extra_two) = state(tmp_path / "runs" / "straight"), state(folder)
    assert one.keys() == two.keys()
    assert {s for _, s in one} == {"weight", "exp_avg", "exp_avg_sq", "ema0", "step"}
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert extra_one == extra_two
    assert metrics(tmp_path / "runs" / "straight") == metrics(folder)
    pages = page(tmp_path / "runs" / "straight"), page(folder)
    heads = [json.loads(pages[i].pop("head.json")) for i in (0, 1)]
    assert heads[0]["state"]["status"] == heads[1]["state"]["status"] == "finished"
    assert pages[0] == pages[1]


def test_two_ranks_killed_three_times_end_where_one_rank_does(tiny, tmp_path) -> None:
    arguments = ["train", tiny.ldm, *LONG, *ZERO]
    alone = start(tmp_path, *arguments, "run=alone")
    finish(alone)
    random.seed(2)
    folder = tmp_path / "runs" / "pair"
    for number in range(3):
        pair = start(tmp_path, *arguments, "run=pair", ranks=2)
        least = random.randrange(16, 300) + 300 * number
        wait_for(pair, lambda least=least: logged(folder) >= least)
        kill(pair)
        assert not (folder / "result.json").exists()
    finish(start(tmp_path, *arguments, "run=pair", ranks=2))
    expected, found = losses(tmp_path / "runs" / "alone"), losses(folder)
    assert list(found) == list(expected) == [*range(48, 1280, 48), 1280]
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def open_job(tiny, tmp_path: Path, *overrides: str) -> DiffusionJob:
    recipe = load_recipe(tiny.ldm, overrides)
    run = Run.open(recipe, root=tmp_path, name="open", rank=1)  # writes and locks nothing
    look = Look(Log(None, quiet=True), Page(tmp_path / "page", "page"))
    return DiffusionJob(recipe, run, look, ALONE, Stopper())


def test_every_world_size_sees_the_same_samples_crops_and_noise(tiny, tmp_path) -> None:
    job = open_job(tiny, tmp_path)
    model = DiT(job.recipe.model, seed=1).eval()
    with torch.no_grad():  # the output layer starts at zero, which would hide the input
        model.final_layer.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    seen: dict[int, dict[int, tuple]] = {}
    for world, micro in ((1, 16), (1, 4), (2, 8), (2, 2), (4, 4)):
        for rank in range(world):
            stream = job.loader.batches(160, 16, micro, rank, world)
            for _ in range(2 * 16 // (micro * world)):  # two steps
                batch = next(stream)
                with torch.no_grad():
                    values = job.losses(model, batch).tolist()
                crops = torch.stack(list(batch.control.values()), dim=1).tolist()
                facts = zip(batch.positions.tolist(), batch.keys, crops, values, strict=True)
                for i, (position, key, crop, value) in enumerate(facts):
                    fact = (key, int(batch.labels[i]), crop)
                    seen.setdefault(position, {}).setdefault((world, micro), (fact, value))
            stream.close()
    assert sorted(seen) == list(range(160, 192))
    for by_shape in seen.values():
        facts, values = zip(*by_shape.values(), strict=True)
        assert len(by_shape) == 5 and all(fact == facts[0] for fact in facts)
        assert values == pytest.approx([values[0]] * 5, rel=1e-5)  # noise, time, dropped label


@pytest.fixture(scope="module")
def poisoned(tiny, tmp_path_factory) -> Path:
    """Runs stopped at 320 images whose embedding of class 3 has then become infinite."""
    root = tmp_path_factory.mktemp("poisoned")
    recipe = load_recipe(tiny.ldm)
    strategy = build_strategy(recipe.strategy, DiT(recipe.model, seed=0), recipe.optim, ALONE, 2, 8)
    with torch.no_grad():
        strategy.module.y_embedder.embedding_table.weight[3] = torch.inf
    extra = {"fingerprint": fingerprint(recipe)}
    for name in ("stops", "skips"):
        save_checkpoint(root / name / "checkpoints", 320, strategy, extra, ALONE)
    return root


def bad_steps(root: Path, name: str) -> dict[int, list[str]]:
    """Start of each step from 320 on -> keys of its samples of class 3 that keep their label."""
    found = {}
    for begin in range(320, 640, 16):
        columns, rows, _ = replay(root / name, begin)
        table = [dict(zip(columns, row, strict=True)) for row in rows]
        keys = [r["sample"] for r in table if r["label"] == "3" and r["label dropped"] == ""]
        found[begin] = keys
    return {begin: keys for begin, keys in found.items() if keys}


def test_a_value_that_is_not_finite_stops_before_the_state_changes(tiny, poisoned) -> None:
    recipe = load_recipe(tiny.ldm)
    with pytest.raises(UserError) as caught:
        run_recipe(recipe, root=poisoned, name="stops", quiet=True)
    bad = bad_steps(poisoned, "stops")
    first = min(bad)
    message = str(caught.value)
    assert f"step {first // 16} (images {first} to {first + 16})" in message
    assert "first in layer `y_embedder" in message and f"--at {first}`" in message
    assert f"samples {', '.join(bad[first])}; no weight was changed" in message
    newest = max((poisoned / "stops" / "checkpoints").glob("step-*"))
    assert int(newest.name.removeprefix("step-")) <= first  # no checkpoint passes the bad step


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny, poisoned) -> None:
    recipe = load_recipe(tiny.ldm, ["loop.on_nonfinite=skip"])
    folder, result = run_recipe(recipe, root=poisoned, name="skips", quiet=True)
    bad = bad_steps(poisoned, "skips")
    assert 0 < len(bad) < 20
    tensors, extra = state(folder)
    assert extra["loop"]["skipped"] == len(bad)
    assert result["images_seen"] == 640
    steps = {tensor.item() for (_, kind), tensor in tensors.items() if kind == "step"}
    assert steps == {20.0 - len(bad)}  # each update counts, each skipped step does not
    rows = read_metrics(folder / "metrics.jsonl", "train")
    assert all(np.isfinite(r["loss"]) for r in rows if r["images_seen"] - 16 not in bad)
    text = (folder / "log.txt").read_text()
    assert all(f"(images {begin} to {begin + 16}) is not finite" in text for begin in bad)


def test_a_diverging_run_of_two_ranks_names_rank_and_samples(tiny, tmp_path) -> None:
    arguments = ["train", tiny.ldm, "optim.lr=1e30", "optim.warmup_images=0", "run=far"]
    pair = start(tmp_path, *arguments, ranks=2)
    _, err = pair.communicate(timeout=120)
    assert pair.returncode == 1  # torchrun's own
    begin = "etude: step 1 (images 16 to 32)"
    lines = [line for line in err.splitlines() if line.startswith(begin)]
    assert len(lines) == 2 and lines[0] == lines[1]
    assert (
        "on rank 0" in lines[0]
        and "Traceback" not in err.split("etude FAILED")[0].split("torch/distributed")[0]
    )


def test_a_start_that_reached_no_checkpoint_leaves_no_line_behind(tiny, tmp_path) -> None:
    recipe = load_recipe(tiny.ldm, ["optim.lr=1e30", "optim.warmup_images=0"])
    for _ in range(2):
        with pytest.raises(UserError, match=r"step 1 \(images 16 to 32\) is not finite"):
            run_recipe(recipe, root=tmp_path, name="far", quiet=True)
    places = [row["images_seen"] for row in read_metrics(tmp_path / "far" / "metrics.jsonl")]
    assert places == [16, 32]
    head = json.loads((tmp_path / "far" / "page" / "head.json").read_text())
    assert head["state"]["status"] == "failed"


def test_a_finite_forward_with_a_bad_gradient_is_told_apart(tiny, tmp_path) -> None:
    from etude.core.loop import find_nonfinite

    job = open_job(tiny, tmp_path)
    strategy = build_strategy(
        job.recipe.strategy, DiT(job.recipe.model), job.recipe.optim, ALONE, 1, 8
    )
    batch = job.loader.fetch(np.arange(8))
    assert find_nonfinite(strategy, job.losses, [batch]) == ("", [])


@pytest.mark.parametrize("phase", ["max_minutes", "SIGUSR1", "latents"])
def test_every_phase_stops_with_85_and_a_requeue_file(tiny, tmp_path, phase) -> None:
    folder = tmp_path / "runs" / "long"
    arguments = ["train", tiny.ldm, "run=long", "loop.images=160000"]
    if phase == "max_minutes":
        process = start(tmp_path, *arguments, "loop.max_minutes=0.05")
        out, err = process.communicate(timeout=60)
        assert process.returncode == EXIT_REQUEUE, err
        reason = "max_minutes=0.05"
    elif phase == "SIGUSR1":
        process = start(tmp_path, *arguments)
        wait_for(process, lambda: logged(folder) > 0)
        with pytest.raises(UserError, match=f"is being written by process {process.pid} on"):
            run_recipe(load_recipe(tiny.ldm), root=tmp_path / "runs", name="long")
        stop(process, signal.SIGUSR1)
        reason = "SIGUSR1"
    else:
        run_recipe(
            load_recipe(tiny.autoencoder, ["loop.images=16"]),
            root=tmp_path / "runs",
            name="ae",
            quiet=True,
        )
        latents = ["autoencoder=runs/ae", "latents.variants=80", "latents.folder=latents"]
        model = ["model.in_channels=2", "model.input_size=8", "model.patch_size=2"]
        process = start(tmp_path, *arguments, *latents, *model)
        wait_for(process, lambda: list(tmp_path.glob("latents/*/*.safetensors")))
        stop(process)
        assert not list(tmp_path.glob("latents/*/cache.json"))
        reason = "SIGTERM"
    assert json.loads((folder / "REQUEUE").read_text())["reason"] == reason
    assert not (folder / "result.json").exists() and not (folder / "lock.json").exists()


def test_a_run_does_not_go_on_with_other_pictures(tiny, tmp_path) -> None:
    place = tmp_path / "train"
    shutil.copytree(tiny.folder / "train", place)
    overrides = [f"data.shards={place}", "loop.images=16", "loop.evaluate_every=16"]
    recipe = load_recipe(tiny.ldm, overrides)
    run = run_recipe(recipe, root=tmp_path, name="run", quiet=True)[0]
    (run / "result.json").unlink()
    place.rename(tmp_path / "moved")
    shutil.copytree(tiny.folder / "monitor", place)
    with pytest.raises(UserError, match="data.shards names other pictures than .*/run was trained"):
        run_recipe(recipe, root=tmp_path, name="run", quiet=True)
    assert not (run / "result.json").exists()
    shutil.rmtree(place)
    place.symlink_to(tmp_path / "moved")  # the same pictures from another place
    assert "stopped" not in run_recipe(recipe, root=tmp_path, name="run", quiet=True)[1]


def test_the_best_checkpoint_is_kept(tiny, tmp_path) -> None:
    """A learning rate that destroys what was learned: the best evaluation is an early one."""
    recipe = load_recipe(
        tiny.ldm,
        [
            "optim.lr=1.0",
            "optim.warmup_images=600",
            "loop.evaluate_every=80",
            "loop.checkpoint.keep_best=true",
            "loop.checkpoint.keep_last=1",
            "optim.ema=[]",
        ],
    )
    folder, _ = run_recipe(recipe, root=tmp_path, quiet=True)
    rows = read_metrics(folder / "metrics.jsonl", "held_out")
    best = min(rows, key=lambda row: row["raw"])["images_seen"]
    kept = {int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*")}
    assert best < 640 and kept == {best, 640}


def test_loaded_weights_are_those_that_were_saved(tiny, tmp_path) -> None:
    """Resuming reads what the loop wrote: the first loss after loading is the loss before."""
    recipe = load_recipe(tiny.ldm, ["loop.images=160"])
    folder, _ = run_recipe(recipe, root=tmp_path, quiet=True)
    job = open_job(tiny, tmp_path)
    batch = job.loader.fetch(np.arange(160, 176))
    values = []
    for _ in range(2):
        strategy = build_strategy(recipe.strategy, DiT(recipe.model), recipe.optim, ALONE, 1, 16)
        load_checkpoint(max((folder / "checkpoints").glob("step-*")), strategy)
        values.append(job.losses(strategy, batch).detach())
    assert torch.equal(*values)
    tensors, _ = state(folder)
    for name, weight in strategy.module.named_parameters():
        assert torch.equal(weight.detach().flatten(), tensors[name, "weight"])
