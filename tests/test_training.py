"""Training end to end on real digits: resume, ranks, kills, stops and values that are not finite.

Runs are real: processes of their own wherever a signal, a kill or a second rank is part of it.
Under launchers: tests/launch/.
"""

import json
import random
import shutil
import signal
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
IMAGES = 640
LONG = [f"loop.images={IMAGES}", "loop.evaluate_every=320", "loop.checkpoint.every_images=80"]
LONG += ["loop.log_every=48"]
ZERO = ["strategy.kind=zero", "strategy.stage=1"]
TIMES = ("time", "images_per_second", "data_wait_percent")


def finish(process) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{process.args}\n{out[-2000:]}{err[-4000:]}"
    return out


def wait_for(process, condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, err = process.communicate(timeout=10)
            raise AssertionError(f"{process.returncode}\n{out[-2000:]}{err[-4000:]}")
        time.sleep(0.01)


def logged(run: Path) -> int:
    """The largest images_seen that the run has logged."""
    return max((row["images_seen"] for row in read_metrics(run / "metrics.jsonl")), default=0)


def stop(process, number: int = signal.SIGTERM) -> str:
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, f"{process.returncode}\n{out}{err[-4000:]}"
    return out


def kill(*processes) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL


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


def assert_same_end(straight: Path, parted: Path) -> None:
    """Both runs have the same tensors to the bit, and the same metrics and pages."""
    assert not (parted / "REQUEUE").exists()
    (one, extra_one), (two, extra_two) = state(straight), state(parted)
    assert one.keys() == two.keys()
    assert {s for _, s in one} == {"weight", "exp_avg", "exp_avg_sq", "ema0", "step"}
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert extra_one == extra_two
    assert metrics(straight) == metrics(parted)
    pages = page(straight), page(parted)
    heads = [json.loads(pages[i].pop("head.json")) for i in (0, 1)]
    assert heads[0]["state"]["status"] == heads[1]["state"]["status"] == "finished"
    assert pages[0] == pages[1]


def stopped(folder: Path, process) -> int:
    """Where a run was that was asked to stop as soon as it had logged something."""
    wait_for(process, lambda: logged(folder) > 0)
    assert "type the same command to go on" in stop(process)
    asked = json.loads((folder / "REQUEUE").read_text())
    assert asked["reason"] == "SIGTERM" and 0 < asked["images_seen"] < IMAGES
    assert not (folder / "result.json").exists()
    return asked["images_seen"]


def test_a_stopped_and_a_killed_run_resume_to_the_same_bits(tiny, tmp_path, forks) -> None:
    """What need not be killed runs in this process."""
    recipe, runs = load_recipe(tiny.ldm, LONG), tmp_path / "runs"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        straight, _ = run_recipe(recipe, root=runs, name="straight", quiet=True)
        folder, words = runs / "parted", ["-m", "etude", "train", tiny.ldm, *LONG, "run=parted"]
        place = stopped(folder, forks.start(*words, cwd=tmp_path))
        parted = forks.start(*words, cwd=tmp_path)
        wait_for(parted, lambda: logged(folder) >= place + 150)
        kill(parted)
        assert not (folder / "result.json").exists()
        run_recipe(recipe, root=runs, name="parted", quiet=True)
    finally:
        torch.set_num_threads(threads)
    assert_same_end(straight, folder)


@pytest.fixture(scope="module")
def sharded(tiny, forks, tmp_path_factory) -> Path:
    """A run of one rank under ZeRO-1 that nothing disturbed."""
    folder = tmp_path_factory.mktemp("sharded")
    words = ["-m", "etude", "train", tiny.ldm, *LONG, *ZERO, "run=straight"]
    finish(forks.start(*words, cwd=folder))
    return folder / "runs" / "straight"


def test_a_stopped_and_a_killed_run_under_zero_resumes_to_the_same_bits(
    tiny, tmp_path, sharded, forks
) -> None:
    """Stopped, killed after it has gone on, and ended."""
    words = ["-m", "etude", "train", tiny.ldm, *LONG, *ZERO, "run=parted"]
    folder = tmp_path / "runs" / "parted"
    place = stopped(folder, forks.start(*words, cwd=tmp_path))
    killed = forks.start(*words, cwd=tmp_path)
    wait_for(killed, lambda: logged(folder) >= place + 150)
    kill(killed)
    finish(forks.start(*words, cwd=tmp_path))
    assert_same_end(sharded, tmp_path / "runs" / "parted")


def test_two_ranks_killed_twice_end_where_one_rank_does(
    tiny, tmp_path, sharded, forks, run_ranks
) -> None:
    """Killed in a first start and in one that had resumed."""
    words = ["-m", "etude", "train", tiny.ldm, *LONG, *ZERO, "run=pair"]
    random.seed(2)
    folder = tmp_path / "runs" / "pair"
    for number in range(2):
        pair = forks.start_ranks(2, *words, cwd=tmp_path)
        least = random.randrange(96, 200) + 200 * number
        wait_for(pair[0], lambda least=least: logged(folder) >= least)
        kill(*pair)
        assert not (folder / "result.json").exists()
    ended = run_ranks(2, *words, cwd=tmp_path)
    assert [rank.returncode for rank in ended] == [0, 0], "".join(rank.stderr for rank in ended)
    expected, found = losses(sharded), losses(folder)
    assert list(found) == list(expected) == [*range(48, IMAGES, 48), IMAGES]
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


def test_a_diverging_run_of_two_ranks_names_rank_and_samples(tiny, tmp_path, run_ranks) -> None:
    words = ["-m", "etude", "train", tiny.ldm, "optim.lr=1e30", "optim.warmup_images=0", "run=far"]
    ended = run_ranks(2, *words, cwd=tmp_path)
    begin = "etude: step 1 (images 16 to 32)"
    lines = [x for rank in ended for x in rank.stderr.splitlines() if x.startswith(begin)]
    assert len(lines) == 2 and lines[0] == lines[1] and "on rank 0" in lines[0]
    assert [rank.returncode for rank in ended] == [2, 2]
    assert "Traceback" not in ended[0].stderr + ended[1].stderr


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


@pytest.mark.parametrize("phase", ["SIGUSR1", "latents"])
def test_every_phase_stops_with_85_and_a_requeue_file(tiny, tmp_path, forks, phase) -> None:
    """By `loop.max_minutes`: tests/test_cli.py."""
    folder = tmp_path / "runs" / "long"
    words = ["-m", "etude", "train", tiny.ldm, "run=long", "loop.images=160000"]
    if phase == "SIGUSR1":
        process = forks.start(*words, cwd=tmp_path)
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
        process = forks.start(*words, *latents, *model, cwd=tmp_path)
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
            "optim.warmup_images=300",
            "loop.images=320",
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
    assert best < 320 and kept == {best, 320}


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
