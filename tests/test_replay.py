"""`runs replay` shows what a step saw; `runs diff` finds the first place where two runs part."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core import distributed, rng
from etude.core.checkpoint import load_checkpoint, save_checkpoint
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import load_recipe
from etude.core.run import Run
from etude.core.signals import Stopper
from etude.core.strategy import build_strategy
from etude.jobs import run_recipe
from etude.models.dit import DiT
from etude.page import Page
from etude.replay import diff_runs, replay, step_batch
from etude.training import Look
from etude.training.diffusion import DiffusionJob

ALONE = distributed.World(0, 1, 0, torch.device("cpu"), ("here:cpu",))


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> dict[str, Path]:
    """Runs by name: in pixels twice with one different step, in latents, and an autoencoder."""
    root = tmp_path_factory.mktemp("replay")
    short = ["loop.images=96", "loop.checkpoint.every_images=32", "loop.evaluate_every=96"]
    short += ["loop.checkpoint.keep_last=9", "data.augment.flip=true"]
    found = {}

    def run(name: str, recipe: str, *overrides: str) -> None:
        loaded = load_recipe(recipe, [*short, *overrides])
        found[name] = run_recipe(loaded, root=root, name=name, quiet=True)[0]

    run("pixels", tiny.ldm)
    run("again", tiny.ldm)
    run("other", tiny.ldm, "optim.lr=2e-3", "optim.warmup_images=48")
    run("ae", tiny.autoencoder)
    run(
        "latents",
        tiny.ldm,
        f"autoencoder={root}/ae",
        f"latents.folder={root}/cache",
        "latents.variants=3",
        "model.in_channels=2",
        "model.input_size=8",
        "model.patch_size=2",
    )
    return found


def rows_of(run: Path, at: int) -> tuple[list[dict], Path]:
    columns, rows, picture = replay(run, at)
    return [dict(zip(columns, row, strict=True)) for row in rows], picture


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_replay_shows_what_the_losses_of_that_step_were_given(runs, tmp_path, name) -> None:
    recipe = load_recipe(runs[name] / "recipe.yaml")
    run = Run.open(recipe, root=tmp_path, name="x", rank=1)
    look = Look(Log(None, quiet=True), Page(tmp_path / "page", "page"))
    job = DiffusionJob(recipe, run, look, ALONE, Stopper())
    given, batches, losses = [], [], job.objective.losses

    def spied(denoiser, x0, eps, times, condition):
        given.append((times, condition["labels"]))
        return losses(denoiser, x0, eps, times, condition)

    job.objective.losses = spied
    stream, model = job.loader.batches(64, 16, 8, 0, 1), DiT(recipe.model)
    for _ in range(2):
        batches.append(next(stream))
        with torch.no_grad():
            job.losses(model, batches[-1])
    stream.close()
    times, labels = (torch.cat(parts).tolist() for parts in zip(*given, strict=True))

    rows, picture = rows_of(runs[name], 70)  # any position of the step
    assert [int(row["position"]) for row in rows] == list(range(64, 80))
    assert [row["sample"] for row in rows] == [key for batch in batches for key in batch.keys]
    assert [float(row["noise level"]) for row in rows] == pytest.approx(times, abs=6e-7)
    asked = [10 if row["label dropped"] else int(row["label"]) for row in rows]
    assert asked == labels
    for column in ("crop_top", "crop_left", "crop_height", "crop_width", "flip", "height"):
        expected = torch.cat([batch.control[column] for batch in batches]).tolist()
        assert [float(row[column]) for row in rows] == expected
    assert len({row["crop_height"] for row in rows}) > 1 and len({r["flip"] for r in rows}) == 2

    shown = step_batch(recipe, 64)
    if name == "pixels":
        assert torch.equal(shown.images, torch.cat([batch.images for batch in batches]))
    else:  # the pictures behind the cached latents: encoded again they give those latents
        mean, std = job.autoencoder.encode(shown.images)
        noise = rng.normal(0, rng.Stream.POSTERIOR, shown.positions, tuple(mean.shape[1:]))
        again = job.autoencoder.scale(mean + std * noise)
        latents = torch.cat([batch.latents for batch in batches])
        assert torch.allclose(again, latents, rtol=1e-4, atol=1e-5)
    with Image.open(picture) as sheet:
        assert sheet.width == 16 * 66 + 2
    assert picture.name == "000000000064.png"


def test_replay_of_an_autoencoder_and_its_limits(runs) -> None:
    rows, _ = rows_of(runs["ae"], 0)
    assert len(rows) == 16 and "noise level" not in rows[0]
    with pytest.raises(UserError, match="--at 96 is outside the run"):
        replay(runs["ae"], 96)


def test_equal_runs_have_no_difference(runs) -> None:
    assert diff_runs(runs["pixels"], runs["again"]) == [
        "training loss: equal at all 6 positions that both logged",
        "checkpoints: all tensors equal in the 3 that both keep",
    ]


def test_the_first_differing_field_position_and_tensor_are_named(runs) -> None:
    """Warm-up ends inside: at equal learning rates nothing differs, so the place is known."""
    lines = diff_runs(runs["pixels"], runs["other"])
    assert "recipe: optim.lr is 0.001 in the first and 0.002 in the second" in lines
    # the first step starts from equal weights, so the second one's loss is the first to differ
    assert any(line.startswith("training loss: first differs at 32 images (") for line in lines)
    assert lines[-1].startswith("checkpoint step-000000000032: ")


def test_one_changed_number_is_found(runs, tiny) -> None:
    recipe = load_recipe(runs["again"] / "recipe.yaml")
    strategy = build_strategy(recipe.strategy, DiT(recipe.model), recipe.optim, ALONE, 2, 8)
    folder = runs["again"] / "checkpoints"
    path = folder / "step-000000000064"
    extra = load_checkpoint(path, strategy)
    name, weight = list(strategy.module.named_parameters())[4]
    with torch.no_grad():
        flat = weight.view(-1)
        flat[7] = flat[7] + 0.25
    extra.pop("images_seen")
    save_checkpoint(folder, 64, strategy, extra, ALONE)
    line = diff_runs(runs["pixels"], runs["again"])[-1]
    expected = f"checkpoint step-{64:012d}: weight of {name} differs, first at element 7, by up to"
    assert line.startswith(expected)
    assert float(line.split()[-1]) == pytest.approx(0.25, rel=1e-3)
    assert np.isfinite(float(line.split()[-1]))
