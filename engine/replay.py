"""What a run did at a step, and where two runs part: `etude runs replay` and `etude runs diff`.

Everything a step sees is a function of the recipe and its position, so nothing was recorded: the
pictures, crops and noise levels are computed again.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from etude.core import rng
from etude.core.checkpoint import verify_checkpoint
from etude.core.errors import UserError
from etude.core.files import write_bytes_atomic
from etude.core.log import read_metrics
from etude.core.recipe import differences
from etude.core.run import load_run
from etude.data.augment import Geometry, geometry
from etude.data.decode_torch import to_signed
from etude.data.loader import Batch, Loader, substitute
from etude.data.picture import BadPicture, probe
from etude.diffusion.objectives import Objective
from etude.training import TrainRecipe

from .pictures import picture_grid, png
from .sampling import to_uint8


def replay(run: str | Path, at: int) -> tuple[list[str], list[list[str]], Path]:
    """The step that covers position `at`.

    Returns:
        Column names, one row per sample (position, key, label, crop, flip, noise level), and the
        path of a PNG with the step's augmented pictures in the same order.
    """
    recipe, folder = load_run(run)
    if not isinstance(recipe, TrainRecipe):
        raise UserError(f"{folder} is of kind {recipe.kind!r}: replay needs a training run")
    if not 0 <= at < recipe.loop.images:
        raise UserError(f"--at {at} is outside the run: name a position below {recipe.loop.images}")
    start = at - at % recipe.loop.global_batch
    batch = step_batch(recipe, start)

    control = {name: values.numpy() for name, values in batch.control.items()}
    columns = ["position", "sample", "label", *control]
    rows = [
        [str(batch.positions[i]), batch.keys[i], str(int(batch.labels[i]))]
        + [f"{values[i]:g}" for values in control.values()]
        for i in range(len(batch.positions))
    ]
    if recipe.kind == "ldm":
        drawn = rng.uniform(recipe.seed, rng.Stream.TIMESTEP, batch.positions)[:, 0]
        times = Objective(recipe.objective).times(torch.as_tensor(drawn, dtype=torch.float32))
        dropped = rng.uniform(recipe.seed, rng.Stream.DROP_SEMANTIC, batch.positions)[:, 0]
        columns += ["noise level", "label dropped"]
        for row, time, share in zip(rows, times.tolist(), dropped, strict=True):
            row += [f"{time:.6f}", "yes" if np.float32(share) < recipe.drop_semantic else ""]
    picture = folder / "replay" / f"{start:012d}.png"
    picture.parent.mkdir(exist_ok=True)
    write_bytes_atomic(picture, png(picture_grid(to_uint8(batch.images), columns=16)))
    return columns, rows, picture


def step_batch(recipe: TrainRecipe, start: int) -> Batch:
    """All pictures of the step that starts at `start`, as training saw or had encoded them."""
    positions = np.arange(start, start + recipe.loop.global_batch, dtype=np.int64)
    loader = Loader(recipe.data.open(), recipe.data, seed=recipe.seed)
    try:
        cached = recipe.kind == "ldm" and recipe.autoencoder and recipe.latents.variants
        return _cached(recipe, loader, positions) if cached else loader.fetch(positions)
    finally:
        loader.close()


def _cached(recipe: TrainRecipe, loader: Loader, positions: np.ndarray) -> Batch:
    """The pictures behind cached latents: a variant's crop belongs to sample and variant."""
    data, seed, variants = loader.data, recipe.seed, recipe.latents.variants
    chosen = rng.integers(seed, rng.Stream.VARIANT, positions, variants).astype(np.int64)
    indices, attempts = loader.order.index(positions), np.zeros(len(positions), np.int64)
    bad: set[int] = set()
    while True:
        for row, position in enumerate(positions):
            while not _readable(loader, int(indices[row]), bad):
                indices[row] = substitute(seed, int(position), int(attempts[row]), len(data))
                attempts[row] += 1
        samples = [data[int(index)] for index in indices]
        sizes = [(found.height, found.width) for found in (probe(s.data) for s in samples)]
        cut: Geometry = geometry(
            recipe.data.augment, seed, indices * variants + chosen, *np.array(sizes, np.int64).T
        )
        images, faults = loader.decoder.decode(samples, cut)
        if not faults:
            break
        bad.update(int(indices[row]) for row in faults)
    return Batch(
        positions=positions,
        keys=[sample.key for sample in samples],
        images=to_signed(images),
        latents=None,
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        control=cut.control(),
    )


def _readable(loader: Loader, index: int, bad: set[int]) -> bool:
    if index not in bad:
        try:
            probe(loader.data[index].data)
        except BadPicture:
            bad.add(index)
    return index not in bad


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
                f"({logged_a[images_seen]} and {logged_b[images_seen]})"
            )
    return f"training loss: equal at all {len(common)} positions that both logged"


def _losses(folder: Path) -> dict[int, float | None]:
    return {
        row["images_seen"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl", "train")
    }


def _first_tensor(folder_a: Path, folder_b: Path) -> str:
    """Checkpoints of equal images_seen, oldest first; tensors in the model's own order."""
    found_a, found_b = (
        {path.name: path for path in (folder / "checkpoints").glob("step-*")}
        for folder in (folder_a, folder_b)
    )
    common = sorted(found_a.keys() & found_b.keys())
    for name in common:
        with verify_checkpoint(found_a[name]) as a, verify_checkpoint(found_b[name]) as b:
            held_a, held_b = (dict.fromkeys(map(_id, c.manifest["tensors"])) for c in (a, b))
            for key in held_a | held_b:
                label = f"checkpoint {name}: {key[1]} of {key[0]}"
                if key not in held_a or key not in held_b or a.shape(*key) != b.shape(*key):
                    return f"{label} is in one of the two only, or has another shape"
                size = int(np.prod(a.shape(*key)))
                gap = _gap(a.read(*key, 0, size), b.read(*key, 0, size))
                if gap:
                    return f"{label} differs, first at element {gap[0]}, by up to {gap[1]:.3g}"
    return f"checkpoints: all tensors equal in the {len(common)} that both keep"


def _id(tensor: dict) -> tuple[str, str]:
    return tensor["name"], tensor["state"]


def _gap(a: Tensor, b: Tensor) -> tuple[int, float] | None:
    """First differing element and largest difference of two flat tensors; None when equal."""
    if torch.equal(a, b):
        return None
    apart = (a.double() - b.double()).abs().nan_to_num(nan=torch.inf)
    return int((a != b).nonzero()[0]), float(apart.max())
