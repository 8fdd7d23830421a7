"""What a run did at a step, and where two runs part: `etude runs replay` and `etude runs diff`.

Everything a step sees is a function of the recipe and its position, so nothing was recorded: the
pictures, crops and noise levels are computed again.
"""

import json
from pathlib import Path

import numpy as np

from etude.core import rng
from etude.core.checkpoint import list_checkpoints, read_tensors
from etude.core.errors import UserError
from etude.core.recipe import differences
from etude.core.run import load_run
from etude.data.loader import Loader
from etude.data.shards import ShardSet
from etude.diffusion.objectives import Objective

from .page import picture_grid, save_png
from .sampling import to_uint8


def replay(run: str | Path, at: int) -> tuple[list[str], list[list[str]], Path]:
    """The step that covers position `at`.

    Returns:
        Column names, one row per sample (position, key, label, crop, flip, noise level), and the
        path of a PNG with the step's augmented pictures in the same order.
    """
    recipe, folder = load_run(run)
    if recipe.kind not in ("ldm", "autoencoder"):
        raise UserError(f"{folder} is of kind {recipe.kind!r}: replay needs a training run")
    if not 0 <= at < recipe.loop.images:
        raise UserError(f"--at {at} is outside the run: name a position below {recipe.loop.images}")
    start = at - at % recipe.loop.global_batch
    positions = np.arange(start, start + recipe.loop.global_batch, dtype=np.int64)
    batch = Loader(ShardSet(recipe.data.shards), recipe.data, seed=recipe.seed).fetch(positions)

    control = {name: values.numpy() for name, values in batch.control.items()}
    columns = ["position", "sample", "label", *control]
    rows = [
        [str(positions[i]), batch.keys[i], str(int(batch.labels[i]))]
        + [f"{values[i]:g}" for values in control.values()]
        for i in range(len(positions))
    ]
    if recipe.kind == "ldm":
        drawn = rng.uniform(recipe.seed, rng.Stream.TIMESTEP, positions)[:, 0]
        times = Objective(recipe.objective).times(drawn)
        dropped = rng.uniform(recipe.seed, rng.Stream.DROP_SEMANTIC, positions)[:, 0]
        columns += ["noise level", "label dropped"]
        for row, time, share in zip(rows, times, dropped):
            row += [f"{float(time):.4f}", "yes" if share < recipe.drop_label else ""]
    picture = folder / "replay" / f"{start:012d}.png"
    picture.parent.mkdir(exist_ok=True)
    save_png(picture, picture_grid(to_uint8(batch.images), columns=16, scale=2))
    return columns, rows, picture


def diff_runs(first: str | Path, second: str | Path) -> list[str]:
    """Lines that say where two runs part: fields, then logged numbers, then stored tensors."""
    (recipe_a, folder_a), (recipe_b, folder_b) = load_run(first), load_run(second)
    lines = [
        f"recipe: {field} is {old!r} in the first and {new!r} in the second"
        for field, old, new in differences(recipe_a, recipe_b)
    ]
    lines.append(_first_metric(folder_a, folder_b))
    lines.append(_first_tensor(folder_a, folder_b))
    return lines


def _first_metric(folder_a: Path, folder_b: Path) -> str:
    logged_a, logged_b = _losses(folder_a), _losses(folder_b)
    common = sorted(logged_a.keys() & logged_b.keys())
    for images_seen in common:
        if logged_a[images_seen] != logged_b[images_seen]:
            return (
                f"training loss: first differs at {images_seen:,} images "
                f"({logged_a[images_seen]:.9g} and {logged_b[images_seen]:.9g})"
            )
    return f"training loss: equal at all {len(common)} positions that both logged"


def _losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["images_seen"]: row["loss"] for row in rows if row["name"] == "train"}


def _first_tensor(folder_a: Path, folder_b: Path) -> str:
    checkpoints_a = {c.name: c for c in list_checkpoints(folder_a / "checkpoints")}
    checkpoints_b = {c.name: c for c in list_checkpoints(folder_b / "checkpoints")}
    common = sorted(checkpoints_a.keys() & checkpoints_b.keys())
    for name in common:
        tensors_a = dict(read_tensors(checkpoints_a[name]))
        tensors_b = dict(read_tensors(checkpoints_b[name]))
        for key in tensors_a.keys() | tensors_b.keys():
            if key not in tensors_a or key not in tensors_b:
                return f"checkpoint {name}: {key} is in one of the two only"
            gap = np.abs(tensors_a[key].double() - tensors_b[key].double()).max().item()
            if gap:
                return f"checkpoint {name}: {key} differs by up to {gap:.3g}"
    return f"checkpoints: all tensors equal in the {len(common)} that both keep"
