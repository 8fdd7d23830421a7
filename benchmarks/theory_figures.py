"""The theory's figures for the documentation: `python -m benchmarks.theory_figures`.

Runs the recipe `practice/theory` (a finished run is kept), appends what its check found to
results/practice_theory.jsonl, and draws docs/practice-theory.svg: accuracy over the examples kept,
and over oversampling; where the hardest beat the easiest; practice on the toy problem.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.case import ROOT
from benchmarks.results import append, machine
from etude.core.errors import UserError
from etude.core.recipe import fingerprint, load_recipe
from etude.core.run import read_json
from etude.jobs import run_recipe

RECIPE, FIGURE = "practice/theory", ROOT / "docs" / "practice-theory.svg"
COLOURS = ("#1f4e9c", "#c44e52", "#2e8b57", "#b8860b")


def draw(figures: dict[str, Any], recipe: Any, file: Path) -> None:
    """Four panels from what a run of the recipe computed."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "etude", "font.size": 9}
    style |= {"axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.4, 6.4), layout="constrained")
        (sizes, oversampling), (map_, toy) = figure.subplots(2, 2)
        for axes, name, xlabel in (
            (sizes, "sizes", "examples kept"),
            (oversampling, "oversampling", f"drawn for each of {recipe.oversampling_size:,} kept"),
        ):
            for label, y in figures[name]["series"].items():
                axes.plot(figures[name]["x"], y, label=label)
            axes.set(xscale="log", xlabel=xlabel, ylabel="accuracy")
            axes.legend(frameon=False)
        gain = np.array(figures["map"]["easy_less_hard"])
        limit = float(np.abs(gain).max())
        mesh = map_.pcolormesh(
            figures["map"]["phi"], figures["map"]["quality"], gain,
            cmap="RdBu", vmin=-limit, vmax=limit, rasterized=True,
        )  # fmt: skip
        map_.set(xscale="log", xlabel="dimensions over examples", ylabel="generator's quality")
        figure.colorbar(mesh, ax=map_, label="error of the easiest less that of the hardest")
        margin = "0.3" if "0.3" in figures["toy"] else next(iter(figures["toy"]))
        for arm, errors in figures["toy"][margin].items():
            toy.plot(100 * np.array(errors), "o-", ms=3, label=arm)
        toy.set(
            xlabel=f"rounds of the toy, margin {margin}", ylabel="test error, %", ylim=(0, None)
        )
        toy.legend(frameon=False)
        for axes in (sizes, oversampling, toy):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None}, dpi=100)


def main() -> int:
    recipe = load_recipe(RECIPE)
    folder, result = run_recipe(recipe)
    if "stopped" in result:
        raise UserError(f"{RECIPE} was stopped ({result['stopped']}): type the command again")
    figures = read_json(folder / "figures.json")
    row = {"recipe": RECIPE, "fingerprint": fingerprint(recipe)}
    row |= {k: figures["check"][k] for k in ("settings", "chi_square", "p", "largest_z")}
    row |= {"largest_share": figures["check"]["largest_share"]}
    row |= {"toy": {m: {a: e[-1] for a, e in arms.items()} for m, arms in figures["toy"].items()}}
    environment = read_json(folder / "environment.json")
    append("practice_theory", [row | machine() | {"revision": environment["revision"]}])
    draw(figures, recipe, FIGURE)
    print(f"{row['settings']} settings, chi-square {row['chi_square']:.1f}, p {row['p']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
