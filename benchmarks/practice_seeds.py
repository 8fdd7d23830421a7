"""Practice and its baselines over seeds: `python -m benchmarks.practice_seeds [STUDY]`.

Runs a study, `studies/practice_seeds` unless another is named (finished jobs are kept), pairs every
arm's correctness on the same real test pictures, and appends one row to
results/practice_seeds.jsonl. Intervals cover repeated draws of test pictures and of seeds, all at
once; all seeds share one generator. Draws docs/<study>.svg, accuracy over pictures, steps and
seconds, and writes the table into the page.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from scipy import stats

from benchmarks.case import ROOT
from benchmarks.readme import replaced
from benchmarks.results import RESULTS, append, machine
from etude.core.errors import UserError
from etude.core.log import read_metrics
from etude.core.recipe import Recipe, fingerprint, load_recipe
from etude.core.run import read_json
from etude.jobs import run_recipe
from etude.practice.paired import compare_all
from etude.practice.rounds import real_first

STUDY = "studies/practice_seeds"
DOCS, PAGE = ROOT / "docs", "how-does-practice-work.md"
REFERENCE = "practice"
COLOURS = {"practice": "#1f4e9c", "real": "#2e8b57", "mixed": "#7bb97b", "static": "#c44e52"}
COLOURS |= {"omega0": "#e39a9c", "frozen": "#6f93cf", "prune": "#b8860b"}


def mean_and_half(values: list[float]) -> list[float]:
    """Mean over seeds and half of its 95% t interval."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    half = stats.t.ppf(0.975, len(values) - 1) * spread if len(values) > 1 else 0.0
    return [round(float(np.mean(values)), 5), round(float(half), 5)]


def figures_of(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """What each arm reached and took: mean over seeds, and half of the interval where it varies."""
    results = [read_json(folder / "result.json")["arms"] for folder in folders]
    found = {}
    for name in real_first(results[0]):
        arms = [arms[name] for arms in results if name in arms]
        found[name] = {
            "kind": arms[0]["kind"],
            "accuracy": mean_and_half([arm["test_accuracy"] for arm in arms]),
            "seeds": len(arms),
        } | {
            key: round(float(np.mean([arm[key] for arm in arms])), 1)
            for key in ("samples", "rounds", "steps", "passes", "drawing_seconds")
        }
    return found


def rounds_of(folders: list[Path], arm: str) -> list[dict[str, float]]:
    """Means over seeds of what the reports of an arm's rounds say, round by round."""
    keys = ("entropy", "agreement", "probe_entropy_unguided", "probe_entropy_guided")
    reports: dict[int, list[dict]] = {}
    for folder in folders:
        for path in sorted(folder.glob(f"arms/{arm}/rounds/*.json")):
            report = read_json(path)
            reports.setdefault(report["round"], []).append(report)
    rows = []
    for number, some in sorted(reports.items()):
        row = {"round": number, "seeds": len(some)}
        row |= {key: round(float(np.mean([r[key] for r in some])), 4) for key in keys}
        row["flips"] = round(float(np.mean([r["flips"]["value"] for r in some])), 4)
        row["near_duplicates"] = round(
            float(np.mean([r["duplicates"]["near_earlier"] for r in some])), 4
        )
        rows.append(row)
    return rows


def row_of(study: Recipe, folders: list[Path]) -> dict[str, Any]:
    """The results row of finished runs, one folder a seed."""
    arms = figures_of(folders)
    everywhere = [name for name, arm in arms.items() if arm["seeds"] == len(folders)]
    correct = {
        name: np.stack([np.load(f / "arms" / name / "correct.npz")["test"] for f in folders])
        for name in everywhere
        if arms[name]["kind"] != "branch"  # the scaling curve, not a comparison
    }
    environments = [read_json(folder / "environment.json") for folder in folders]
    row = {
        "study": study.name,
        "fingerprint": fingerprint(study),
        "seeds": len(folders),
        "test_pictures": correct[REFERENCE].shape[1],
        "arms": arms,
        "difference": {
            f"{REFERENCE} - {other}": vars(interval)
            for other, interval in compare_all(correct, REFERENCE).items()
        },
        "rounds": {name: rounds_of(folders, name) for name in (REFERENCE, "frozen")},
    }
    revisions = sorted({str(environment["revision"]) for environment in environments})
    return row | machine() | {"revision": ", ".join(revisions), "date": environments[-1]["date"]}


def monitor_curves(folders: list[Path], x: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Monitor accuracy of each arm at each look, and `x` then, means over seeds."""
    seen: dict[str, list[tuple[list, list]]] = {}
    for folder in folders:
        rows: dict[str, tuple[list, list]] = {}
        for row in read_metrics(folder / "metrics.jsonl"):
            if row["name"].startswith("practice/"):
                xs, ys = rows.setdefault(row["name"].removeprefix("practice/"), ([], []))
                xs.append(row[x])
                ys.append(row["monitor_accuracy"])
        for name, points in rows.items():
            seen.setdefault(name, []).append(points)
    curves = {}
    for name, points in seen.items():
        length = min(len(xs) for xs, _ in points)
        columns = [np.mean([p[axis][:length] for p in points], axis=0) for axis in (0, 1)]
        curves[name] = (columns[0], columns[1])
    return curves


def colours_of(kinds: dict[str, str]) -> dict[str, tuple]:
    """A colour for each arm: its kind's, paler for each further arm of that kind."""
    found, seen = {}, {}
    for name, kind in kinds.items():
        kind = "practice" if kind == "branch" else kind
        place = 0 if kinds[name] == "branch" else seen.setdefault(kind, 0)
        seen[kind] = place + 1
        rgb = np.array(matplotlib.colors.to_rgb(COLOURS[kind]))
        found[name] = tuple(1.0 - (1.0 - rgb) * 0.75**place)
    return found


def draw(row: dict[str, Any], folders: list[Path], file: Path) -> None:
    """Test accuracy over pictures, and monitor accuracy over steps and seconds."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "etude", "font.size": 9}
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.5, 4.0), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        colours = colours_of({name: arm["kind"] for name, arm in row["arms"].items()})
        for name, arm in row["arms"].items():
            value, half = arm["accuracy"]
            left.errorbar(
                arm["samples"], value, half, fmt="o" if arm["kind"] != "branch" else ".",
                color=colours[name], ms=5, lw=1, label=None if arm["kind"] == "branch" else name,
            )  # fmt: skip
        scaling = [a for a in row["arms"].values() if a["kind"] in ("practice", "branch")]
        scaling = sorted((arm["samples"], arm["accuracy"][0]) for arm in scaling)
        left.plot(*zip(*scaling, strict=True), color=COLOURS["practice"], lw=1)
        left.set_xscale("log", base=2)
        left.set(xlabel="different pictures", ylabel="accuracy on real test pictures")
        for axes, x, label in ((middle, "step", "steps"), (right, "seconds", "seconds in all")):
            for name, (xs, ys) in monitor_curves(folders, x).items():
                kind = row["arms"].get(name, {}).get("kind", "branch")
                if kind != "branch":
                    axes.plot(xs, ys, color=colours[name], lw=1.2)
            axes.set(xlabel=label, ylabel="accuracy on monitor pictures")
            axes.set_ylim(max(0.0, row["arms"][REFERENCE]["accuracy"][0] - 0.15), 1.0)
        for axes in (left, middle, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.xaxis.set_minor_formatter("")
        figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=8)
        figure.savefig(file, metadata={"Date": None})


def table(row: dict[str, Any]) -> list[str]:
    """Arms and how practice compares with each, as lines of Markdown; real pictures first."""
    head = ["arm", "pictures", "denoiser passes", "accuracy, %", "practice better by, points", "p"]
    lines = [head, ["---"] * len(head)]
    for name, arm in row["arms"].items():
        if arm["kind"] == "branch":
            continue
        value, half = (100 * number for number in arm["accuracy"])
        cells = [
            name,
            f"{arm['samples']:,.0f}",
            f"{arm['passes']:,.0f}",
            f"{value:.1f} ± {half:.1f}",
        ]
        gap = row["difference"].get(f"{REFERENCE} - {name}")
        if gap is None:
            cells += ["", ""]
        else:
            numbers = [100 * gap[key] for key in ("value", "low", "high")]
            cells += ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*numbers)]
            cells += [f"{gap['adjusted_p_value']:.2g}"]
        lines.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def newest() -> dict[str, dict[str, Any]]:
    """The last row of each study, by the study's name."""
    file = RESULTS / "practice_seeds.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["study"]: row for row in map(json.loads, lines)}


def main(name: str = STUDY) -> int:
    study = load_recipe(name)
    _, result = run_recipe(study)
    if "stopped" in result:
        raise UserError(f"{study.name} was stopped ({result['stopped']}): type the command again")
    folders = [Path(f) for label, f in result["runs"].items() if label.startswith("practice[")]
    row = row_of(study, folders)
    append("practice_seeds", [row])
    stem = study.name.split("/")[-1]
    draw(row, folders, DOCS / f"{stem}.svg")
    page = DOCS / PAGE
    page.write_text(replaced(page.read_text(), f"<!-- {stem} -->", table(row)))
    print("\n".join(table(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
