"""What a start from a smaller size is worth: `python -m benchmarks.transfer_digits`.

Runs the study `studies/transfer_digits` (finished jobs are kept), and measures every checkpoint's
held-out loss under one law of noise levels, whatever the run itself was trained under: a shift of
the flow schedule changes how often a time is seen, and not what a time means. From those curves
come the images until a loss is reached. Fréchet distances and labels as asked are those of the
study's evaluations. Appends one row to results/transfer_digits.jsonl and draws
docs/transfer-digits.svg.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from etude.core import rng
from etude.core.checkpoint import read_weights
from etude.core.files import read_json, write_json_atomic
from etude.core.recipe import fingerprint, load_recipe
from etude.core.run import load_run
from etude.data.shards import ShardSet
from etude.data.still import still_loader
from etude.jobs import run_recipe
from etude.metrics.frechet import frechet_name
from etude.models.families import build_denoiser
from etude.sampling import Generator, denoiser, open_generator
from etude.training.origin import find_weights
from etude.training.recipe import LatentDiffusionRecipe
from etude.transfer import transfer

from .results import append, machine

STUDY = "studies/transfer_digits"
FIGURE = Path(__file__).parents[1] / "docs" / "transfer-digits.svg"
PICTURES = 200  # held-out, each at a time of its own
GOALS = ("extrapolate, shift 1", "scratch, shift 1")  # arms with neither proposal
LAWS = {"uniform": 1.0, "shifted": 2.0}  # times that losses are means over, and their shift
COLORS = {"interpolate": "#1f4e9c", "extrapolate": "#c44e52", "scratch": "#7f7f7f"}


@dataclass(frozen=True)
class HeldOut:
    """Noisy held-out latents x (n, C, h, w) at times t (n,), what a network should say of them,
    and what it is asked by.
    """

    x: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    condition: dict[str, torch.Tensor]

    def losses(self, model: torch.nn.Module, block: int = 100) -> np.ndarray:
        """Squared error of each sample, (n,) float64."""
        found = []
        with torch.no_grad():
            for rows in torch.arange(len(self.t)).split(block):
                asked = {name: value[rows] for name, value in self.condition.items()}
                said = denoiser(model)(self.x[rows], self.t[rows], asked)
                found.append((said - self.target[rows]).double().square().flatten(1).mean(1))
        return torch.cat(found).numpy()


def held_out(recipe: LatentDiffusionRecipe, generator: Generator) -> HeldOut:
    """The same pictures, noises and times for every run of one size; times evenly over [0, 1]."""
    loader = still_loader(ShardSet(recipe.held_out), recipe.data)
    try:
        batch = loader.fetch(np.arange(PICTURES))
    finally:
        loader.close()
    mean, std = generator.autoencoder.encode(batch.images)
    shape = tuple(mean.shape[1:])
    spread = std * rng.normal(0, rng.Stream.POSTERIOR, batch.positions, shape)
    x0 = generator.autoencoder.scale(mean + spread)
    eps = rng.normal(0, rng.Stream.NOISE, batch.positions, shape)
    order = rng.permute(batch.positions, PICTURES, 0, rng.Stream.TIMESTEP, 0)
    t = torch.from_numpy((order + 0.5) / PICTURES).float()
    objective = generator.objective
    return HeldOut(
        objective.noise(x0, eps, t),
        t,
        objective.target(x0, eps, t),
        generator.conditions.of_batch(batch),
    )


def mean_loss(losses: np.ndarray, t: np.ndarray, shift: float) -> float:
    """Mean of losses (n,) at times spread evenly over [0, 1], as if those were shifted ones.

    With t = s u / (1 + (s - 1) u) of a uniform u, the density of t is s / (s - (s - 1) t)^2.
    """
    density = shift / (shift - (shift - 1.0) * t) ** 2
    return float((losses * density).sum() / density.sum())


def images_to_reach(images: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """Images at which a curve first is at `target` or below, straight between its points."""
    for k, loss in enumerate(losses):
        if loss <= target:
            if k == 0:
                return float(images[0])
            share = (losses[k - 1] - target) / (losses[k - 1] - loss)
            return float(images[k - 1] + share * (images[k] - images[k - 1]))
    return None


def arm_of(recipe: LatentDiffusionRecipe) -> str:
    """What a run of the study is called in the row and the figure."""
    start = recipe.start.positions if recipe.start.source else "scratch"
    return f"{start}, shift {recipe.objective.shift:g}"


def curve(folder: Path) -> dict[str, dict[str, float]]:
    """A run's held-out loss by images seen, 0 and its checkpoints, under each law; kept in it."""
    laws = "-".join(f"{shift:g}" for shift in LAWS.values())
    kept = folder / f"held_out_under_one_law-{PICTURES}-{laws}.json"
    if kept.exists():
        return read_json(kept)
    recipe, folder = load_run(folder)
    here = held_out(recipe, open_generator(folder))
    model = build_denoiser(recipe.model, seed=recipe.seed).eval()
    if recipe.start.source:
        source = find_weights(recipe.start, recipe.model)
        transfer(source.read(), source.config, model, match="numbers")
    measured = {0: here.losses(model)}
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        model.load_state_dict(read_weights(checkpoint, recipe.default_weights()))
        measured[int(checkpoint.name.removeprefix("step-"))] = here.losses(model)
    times = here.t.double().numpy()
    found = {
        law: {f"{images}": mean_loss(losses, times, shift) for images, losses in measured.items()}
        for law, shift in LAWS.items()
    }
    write_json_atomic(kept, found)
    return found


def bounds(interval: dict[str, Any]) -> list[float]:
    """Value and ends of an evaluation's interval."""
    return [round(interval[name], 4) for name in ("value", "low", "high")]


def draw(images: Sequence[int], arms: dict[str, dict]) -> None:
    """Loss over images, a line per arm: the mean of its seeds, and their range."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "etude"})
    figure, axes = plt.subplots(figsize=(6.5, 3.6))
    for arm, found in arms.items():
        start, _, shift = arm.partition(", shift ")
        style = {"color": COLORS[start], "ls": "-" if shift == "1" else "--"}
        values = np.array(found["loss"]["uniform"])
        axes.plot(images, values.mean(0), label=arm, lw=1.4, **style)
        axes.fill_between(images, values.min(0), values.max(0), color=style["color"], alpha=0.15)
    axes.set(xlabel="images seen at 32 pixels", ylabel="held-out loss, times uniform", yscale="log")
    axes.set_yticks([0.5, 0.7, 1.0, 1.4, 2.0], ["0.5", "0.7", "1", "1.4", "2"])
    axes.minorticks_off()
    axes.grid(lw=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    study = load_recipe(STUDY)
    _, result = run_recipe(study)
    if "stopped" in result:
        sys.exit(f"{STUDY} was stopped ({result['stopped']}); type the same command to go on")
    arms: dict[str, dict] = {}
    row: dict[str, Any] = {"study": STUDY, "fingerprint": fingerprint(study)}
    for label, evaluation in result["jobs"].items():
        if not label.startswith("evaluate_"):
            continue
        recipe, folder = load_run(load_run(result["runs"][label])[0].generator)
        losses = curve(folder)
        distance = evaluation["figures"][frechet_name(evaluation["extractor"]["name"])]
        arm = arms.setdefault(arm_of(recipe), {})
        arm.setdefault("seeds", []).append(recipe.seed)
        arm.setdefault("frechet", []).append(bounds(distance["generated"]))
        arm.setdefault("labelled_as_asked", []).append(bounds(evaluation["labels"]["agreement"]))
        for law, values in losses.items():
            own = [round(value, 4) for value in values.values()]
            arm.setdefault("loss", {}).setdefault(law, []).append(own)
        row |= {
            "images": [int(images) for images in losses["uniform"]],
            "protocol": evaluation["protocol_fingerprint"],
            "pictures": evaluation["counts"]["generated"],
            "frechet_real": bounds(distance["real"]),
            "pictures_real": evaluation["counts"]["real"],
        }
    for arm in arms.values():
        arm["images_to_reach"] = {
            f"the end of {goal}, {law} times": [
                images_to_reach(
                    row["images"], losses, float(np.mean(arms[goal]["loss"][law], 0)[-1])
                )
                for losses in arm["loss"][law]
            ]
            for goal in GOALS
            for law in arm["loss"]
        }
    row |= {"arms": arms} | machine()
    append("transfer_digits", [row])
    draw(row["images"], arms)
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
