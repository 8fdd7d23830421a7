"""Families of models side by side: `python -m benchmarks.families [STUDY]`.

Runs a study whose jobs train one kind of data with one budget, `studies/families_cifar10` unless
another is named (finished jobs are kept). Appends one row to results/families.jsonl, draws
docs/<study>.svg (losses) and docs/<study>-<job>.png (samples), and writes the table into the page.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from benchmarks.case import ROOT
from benchmarks.readme import replaced
from benchmarks.results import RESULTS, append, machine
from etude.core.errors import UserError
from etude.core.log import read_metrics
from etude.core.recipe import Recipe, fingerprint, load_recipe
from etude.core.run import load_run, read_json
from etude.estimate import parameter_count
from etude.jobs import run_recipe
from etude.pictures import picture_grid
from etude.sampling import balanced_labels, open_generator

STUDY = "studies/families_cifar10"
DOCS = ROOT / "docs"
PAGE = "which-family-do-i-train.md"
FAMILIES = {"dit": "DiT", "mdt": "MDTv2", "pixart": "PixArt", "mmdit": "mmDiT", "unet": "U-Net"}
COLOURS = ("#1f4e9c", "#c44e52", "#2e8b57", "#b8860b", "#7b4ea3")
PALETTE = 128  # colours of a grid's PNG: a third of the bytes, and no difference to the eye


def losses(recipe: Recipe, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(images seen, loss): "training" per pass of the network, "held_out" of the averaged weights.

    A masked family takes two passes a step and logs the sum of their losses.
    """
    file, passes = folder / "metrics.jsonl", 1
    if getattr(recipe.model, "mask_ratio", None) is not None:
        passes = 2
    held_out = read_metrics(file, "held_out")
    return {
        "training": [(r["images_seen"], r["loss"] / passes) for r in read_metrics(file, "train")],
        "held_out": [(r["images_seen"], r[recipe.default_weights()]) for r in held_out],
    }


def measured(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a finished run says of itself.

    `images_per_second` is the median over the log lines; `seconds` are those of training with all
    looks at held-out pictures but the last.
    """
    rows = read_metrics(folder / "metrics.jsonl", "train")
    counts = np.diff([0, *(row["images_seen"] for row in rows)]).tolist()
    rates = [row["images_per_second"] for row in rows]
    result = read_json(folder / "result.json")
    return {
        "family": recipe.model.family,
        "parameters": parameter_count(recipe),
        "images_per_second": round(statistics.median(rates), 1),
        "seconds": round(sum(c / rate for c, rate in zip(counts, rates, strict=True))),
        "held_out": [[i, round(loss, 4)] for i, loss in losses(recipe, folder)["held_out"]],
        "constant_predictor": round(result["constant_predictor_loss"], 4),
    }


def row_of(study: Recipe, runs: dict[str, tuple[Recipe, Path]]) -> dict[str, Any]:
    """The results row; its revision is that of the runs, not of this measurement."""
    environments = [read_json(folder / "environment.json") for _, folder in runs.values()]
    loop = next(recipe.loop for recipe, _ in runs.values())
    row = {
        "study": study.name,
        "fingerprint": fingerprint(study),
        "images": loop.images,
        "global_batch": loop.global_batch,
        "jobs": {job: measured(recipe, folder) for job, (recipe, folder) in runs.items()},
    } | machine()
    revisions = sorted({str(found["revision"]) for found in environments})
    return row | {"date": max(e["date"] for e in environments), "revision": ", ".join(revisions)}


def draw_losses(runs: dict[str, tuple[Recipe, Path]], constant: float, file: Path) -> None:
    """One colour a job: training as a thin line, held out as dots on a thick one."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "etude", "font.size": 9}):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot(xlabel="training pictures seen", ylabel="loss", yscale="log")
        lowest = constant
        for (job, (recipe, folder)), colour in zip(runs.items(), itertools.cycle(COLOURS)):
            found = losses(recipe, folder)
            axes.plot(*zip(*found["training"], strict=True), color=colour, lw=0.7, alpha=0.6)
            axes.plot(
                *zip(*found["held_out"], strict=True), "o-", color=colour, lw=1.8, ms=4,
                label=f"{FAMILIES.get(job, job)}  {found['held_out'][-1][1]:.3f}",
            )  # fmt: skip
            lowest = min(lowest, *(loss for _, loss in found["training"] + found["held_out"]))
        axes.axhline(constant, color="black", lw=0.8, ls="--", label=f"a constant  {constant:.3f}")
        ticks = [t for t in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5) if t >= 0.8 * lowest]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="held out, at the end", frameon=False)
        figure.savefig(file, metadata={"Date": None})


def draw_samples(recipe: Recipe, folder: Path, file: Path) -> None:
    """The sample grid of the run's recipe, drawn from its last checkpoint: a class or prompt a
    column.
    """
    generator, grid = open_generator(folder), recipe.grid
    columns = len(grid.prompts) or min(max(generator.num_classes, 1), grid.max_classes)
    indices = np.arange(columns * grid.per_class)
    captions = grid.prompts * grid.per_class or None
    labels = balanced_labels(indices, columns)
    pictures, _ = generator.draw(indices, labels, seed=grid.seed, captions=captions)
    sheet = Image.fromarray(picture_grid(pictures, columns=columns))
    sheet.quantize(PALETTE, dither=Image.Dither.NONE).save(file, optimize=True)


def table(row: dict[str, Any]) -> list[str]:
    """Parameters and held-out losses of the row, as lines of Markdown."""
    looks = [images for images, _ in next(iter(row["jobs"].values()))["held_out"]]
    head = ["family", "parameters", "a constant", *(f"at {images:,}" for images in looks)]
    lines = [head, ["---"] * len(head)]
    for job, found in row["jobs"].items():
        cells = [FAMILIES.get(job, job), f"{found['parameters']:,}"]
        shown = [found["constant_predictor"], *(loss for _, loss in found["held_out"])]
        lines.append(cells + [f"{loss:.3f}" for loss in shown])
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def newest() -> dict[str, dict[str, Any]]:
    """The last row of each study, by the study's name."""
    file = RESULTS / "families.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["study"]: row for row in map(json.loads, lines)}


def main(name: str = STUDY) -> int:
    study = load_recipe(name)
    _, result = run_recipe(study)
    if "stopped" in result:
        raise UserError(f"{study.name} was stopped ({result['stopped']}): type the command again")
    runs = {job: load_run(folder) for job, folder in result["runs"].items()}
    row = row_of(study, runs)
    append("families", [row])
    stem = study.name.split("/")[-1]
    constant = next(iter(row["jobs"].values()))["constant_predictor"]
    draw_losses(runs, constant, DOCS / f"{stem}.svg")
    for job, (recipe, folder) in runs.items():
        draw_samples(recipe, folder, DOCS / f"{stem}-{job}.png")
    page = DOCS / PAGE
    page.write_text(replaced(page.read_text(), f"<!-- {stem} -->", table(row)))
    print("\n".join(table(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
