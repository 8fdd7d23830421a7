"""How far omega moves pictures, how sure the learner stays, and when a judge sees another class.

    python -m benchmarks.guidance_omega --generator RUN --practice RUN --judge RUN

Draws the same pictures of a generator's run under every omega of a grid, pushed by the learner that
guided a practice run's newest round: toward its entropy along both gradient paths, and in the two
ways that mind the label (its loss is weighed in, or lowered where the learner gives another
answer), with that run's sampler and guidance otherwise. Of each: the learner's mean entropy, its
share of answers that are the label asked for, the judge's share of other answers with a 95%
interval, and the mean distance from the unguided picture of the same index (root mean square of 255
levels). Appends a row for each to results/guidance_omega.jsonl and draws docs/guidance-omega.svg.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from etude.core.run import load_run
from etude.data.pool_parts import read_manifest
from etude.diffusion.criteria import entropy
from etude.diffusion.guidance import GuidanceConfig
from etude.evaluation.judge import Judge, open_judge
from etude.metrics.intervals import IntervalConfig, proportion
from etude.practice.learner import load_frozen
from etude.practice.pictures import to_model
from etude.practice.supply import learner_file
from etude.sampling import Generator, balanced_labels, open_generator

from .results import append, machine

OMEGAS = (0.0, 0.01, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5)
WAYS: dict[str, dict[str, Any]] = {
    "full": {"path": "full"},
    "stop_denoiser": {"path": "stop_denoiser"},
    "full, entropy_label": {"path": "full", "criterion": "entropy_label"},
    "full, keep_label": {"path": "full", "keep_label": True},
}
OWN = ("path", "criterion", "keep_label")  # of a way
STYLES = dict(zip(WAYS, ("#1f4e9c", "#c44e52", "#55a868", "#8172b3"), strict=True))
FIGURE = Path(__file__).parents[1] / "docs" / "guidance-omega.svg"


def learner_of(practice: str, arm: str = "practice") -> tuple[torch.nn.Module, str]:
    """The learner that guided an arm's newest pictures, and its name in the pool."""
    recipe, folder = load_run(practice)
    pool = folder / "pools" / arm
    names = [part.learner for part in read_manifest(pool) if part.learner]
    if not names:
        sys.exit(f"{folder} has added no round yet: name a practice run with one")
    return load_frozen(recipe.learner, learner_file(pool, names[-1])), names[-1]


def figures(
    images: np.ndarray,
    plain: np.ndarray,
    labels: np.ndarray,
    learner: torch.nn.Module,
    judge: Judge,
) -> dict[str, Any]:
    """What is said of pictures and unguided ones (n, S, S, C) uint8 with labels (n,) int64."""
    blocks = np.array_split(np.arange(len(images)), -(-len(images) // 256))
    with torch.no_grad():
        logits = torch.cat([learner(to_model(images[rows], "cpu")) for rows in blocks])
    wrong = judge.labels(images) != labels
    apart = (images.astype(np.float64) - plain).reshape(len(images), -1)
    interval = proportion(float(wrong.mean()), len(wrong), IntervalConfig())
    return {
        "entropy": round(float(entropy(logits).mean()), 4),
        "agreement": round(float((logits.argmax(1).numpy() == labels).mean()), 4),
        "wrong": [round(float(v), 4) for v in (interval.value, interval.low, interval.high)],
        "distance": round(float(np.sqrt((apart**2).mean(1)).mean()), 3),
    }


def measure(
    generator: Generator, practice: str, judge: str, omegas: list[float], pictures: int
) -> list[dict[str, Any]]:
    """A row of figures for each omega and way."""
    recipe, _ = load_run(practice)
    learner, name = learner_of(practice)
    opened = open_judge(judge)
    indices = np.arange(pictures)
    labels = balanced_labels(indices, generator.num_classes)
    plain, _ = generator.draw(indices, labels, seed=recipe.seed)
    kept = recipe.guidance.model_dump(exclude={"omega", "label_weight", *OWN})
    rows = []
    for way, fields in WAYS.items():
        for omega in omegas:
            guidance = GuidanceConfig(**kept | fields, omega=omega)
            images, _ = generator.draw(
                indices, labels, seed=recipe.seed, learner=learner, guidance=guidance
            )
            row = {"way": way, "omega": omega, "pictures": pictures, "learner": name}
            row |= figures(images, plain, labels, learner, opened)
            row |= {"guidance": guidance.model_dump(mode="json"), "protocol": generator.protocol}
            rows.append(row)
            print({name: row[name] for name in list(row)[:8]}, flush=True)
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Four panels over omega, a line for each way."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "etude"})
    panels = {
        "entropy": "learner's entropy, nats",
        "agreement": "learner's answers as asked",
        "wrong": "judge's answers not as asked",
        "distance": "distance from unguided, levels",
    }
    figure, grid = plt.subplots(1, 4, figsize=(11, 2.7))
    for axes, (name, title) in zip(grid, panels.items(), strict=True):
        for way, color in STYLES.items():
            own = [row for row in rows if row["way"] == way]
            omegas = [row["omega"] for row in own]
            values = np.array([row[name] for row in own])
            middle = values[:, 0] if name == "wrong" else values
            axes.plot(omegas, middle, "o-", ms=3, lw=1.2, color=color, label=way)
            if name == "wrong":
                axes.fill_between(omegas, values[:, 1], values[:, 2], color=color, alpha=0.15)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("omega", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(lw=0.3)
    grid[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", required=True, help="run of a latent-diffusion generator")
    parser.add_argument("--practice", required=True, help="practice run whose learner pushes")
    parser.add_argument("--judge", required=True, help="run or folder of a judge")
    parser.add_argument("--pictures", type=int, default=512, help="pictures for each omega")
    parser.add_argument("--omegas", type=float, nargs="+", default=OMEGAS)
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the figure goes")
    given = parser.parse_args(arguments)
    if given.pictures < 1:
        parser.error("--pictures must be at least 1")
    recipe, _ = load_run(given.practice)
    generator = open_generator(given.generator, weights=recipe.weights, sampler=recipe.sampler)
    common = machine("cpu") | {"generator": generator.name}
    rows = measure(generator, given.practice, given.judge, list(given.omegas), given.pictures)
    append("guidance_omega", [common | row for row in rows])
    draw(rows, given.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
