"""Practice, its theory and evaluation on the page, from what their runs wrote; called by jobs.py.

Everything is read from the run's folder, so a resumed job's page shows the whole run.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from etude.core.files import read_json
from etude.core.log import read_metrics
from etude.evaluation.report import result_table
from etude.practice.rounds import real_first
from etude.practice.theory_report import TheoryRecipe

from .pictures import enlarge
from .training import Look

_KINDS = {
    "real": "real training pictures",
    "mixed": "real and unguided ones",
    "practice": "guided pictures added at plateaus",
    "static": "as many, unguided, from the start",
    "omega0": "unguided ones added when practice added",
    "frozen": "guided by the first round's learner, added when practice added",
    "prune": "chosen by a score from unguided ones, added when practice added",
    "branch": "practice from one of its rounds on, without adding",
}


def show_practice(folder: Path, look: Look) -> None:
    """Monitor accuracy of every arm, the hardest pictures of every round, and the table."""
    page, order = look.page, look.order
    page.chapter(
        look.id("practice"),
        look.title("Practice"),
        "A classifier that learned from generated pictures only, beside its baselines.",
        order=order,
    )
    _accuracy_curves(folder, look)
    reports = sorted((folder / "arms").glob("practice/rounds/*.json"))
    for path in reports:
        report = read_json(path)
        hardest = np.asarray(Image.open(path.with_suffix(".png")).convert("RGB"))
        page.grid(
            look.id("hardest"),
            "The pictures the classifier found hardest",
            enlarge(hardest, 3),
            f"Entropy {report['entropy']:.2f} nats, {report['agreement']:.0%} labelled as asked.",
            f"round {report['round']}, {report['samples']:,} pictures",
            order=order + 2,
        )
    _rounds(reports, look)
    paths = (folder / "arms").glob("*/result.json")
    arms = real_first({path.parent.name: read_json(path) for path in sorted(paths)})
    _accuracy_by_pictures(arms, look)
    if arms:
        kinds = {arm["kind"] for arm in arms.values()}
        columns = ["arm", "test accuracy", "95% interval", "pictures", "rounds", "steps"]
        page.table(
            look.id("practice-table"),
            "Accuracy on real test pictures",
            columns,
            [
                [
                    name,
                    arm["test_accuracy"],
                    "{:.3f} to {:.3f}".format(*arm["test_interval"]),
                    f"{arm['samples']:,}",
                    arm["rounds"],
                    f"{arm['steps']:,}",
                ]
                for name, arm in arms.items()
            ],
            note="; ".join(f"{kind}: {text}" for kind, text in _KINDS.items() if kind in kinds)
            + ". Same steps, weights and tuning.",
            order=order + 3,
        )
    page.write()


def _accuracy_curves(folder: Path, look: Look) -> None:
    """Monitor accuracy of every arm but branches, over steps and over seconds."""
    by_step: dict[str, tuple[list, list]] = {}
    by_second: dict[str, tuple[list, list]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        name = row["name"].removeprefix("practice/")
        if not row["name"].startswith("practice/") or name.startswith("branch"):
            continue
        for found, x in ((by_step, "step"), (by_second, "seconds")):
            if x not in row:  # written by an older version
                continue
            xs, ys = found.setdefault(name, ([], []))
            xs.append(row[x])
            ys.append(row["monitor_accuracy"])
    if not by_step:
        return
    title, place = "Accuracy on the real monitor pictures", look.order + 1
    page, id = look.page, look.id("practice-accuracy")
    page.curve(id, title, by_step, "steps", "accuracy", order=place)
    xlabel = "seconds of learning and drawing"
    page.curve(f"{id}-seconds", title, by_second, xlabel, "accuracy", order=place + 0.1)


def _rounds(paths: list[Path], look: Look) -> None:
    """What each round did to its pictures, and how hard those of earlier rounds became since."""
    reports = [read_json(path) for path in paths]
    if not reports:
        return
    page, order = look.page, look.order
    page.table(
        look.id("practice-rounds"),
        "The rounds of practice",
        ["round", "entropy unguided", "guided", "labelled as asked", "lost their class", "twins"],
        [
            [
                str(report["round"]),
                _of(report, "probe_entropy_unguided", "{:.2f}"),
                _of(report, "probe_entropy_guided", "{:.2f}"),
                f"{report['agreement']:.1%}",
                f"{report['flips']['value']:.1%} ({report['flips']['method']})",
                f"{report['duplicates']['near_earlier']:.1%}",
            ]
            for report in reports
        ],
        note="Entropy in nats of the classifier that asked for the round, on the same indices drawn"
        " without and with guidance. Twins: new pictures that nearly equal one of the pool.",
        order=order + 2.1,
    )
    numbers = range(len(reports[-1]["error_by_round"]))
    drift = {
        f"round {number}": tuple(
            zip(
                *[
                    (report["round"], report["error_by_round"][number])
                    for report in reports
                    if report["round"] >= number
                ],
                strict=True,
            )
        )
        for number in numbers
    }
    page.curve(
        look.id("practice-drift"),
        "How hard the pictures of a round are for later classifiers",
        drift,
        "round that was asked for",
        "labelled otherwise than asked",
        order=order + 2.2,
    )


def _of(report: dict[str, Any], name: str, form: str) -> str:
    return form.format(report[name]) if name in report else ""


def _accuracy_by_pictures(arms: dict[str, dict], look: Look) -> None:
    """Test accuracy over the pictures that an arm had: a line for practice and its branches."""
    lines = {"branch": "practice", "practice": "practice", "static": "static"}
    points: dict[str, list[tuple[int, float]]] = {}
    for name, arm in arms.items():
        point = (arm["samples"], arm["test_accuracy"])
        points.setdefault(lines.get(arm["kind"], name), []).append(point)
    if points:
        series = {name: tuple(zip(*sorted(found), strict=True)) for name, found in points.items()}
        look.page.curve(
            look.id("practice-pictures"),
            "Accuracy on real test pictures",
            series,
            "different pictures",
            "accuracy",
            order=look.order + 1.2,
        )


def show_theory(recipe: TheoryRecipe, figures: dict[str, Any], look: Look) -> None:
    """The figures of the theory that have been computed so far."""
    page, order = look.page, look.order
    page.chapter(
        look.id("theory"),
        look.title("Which examples are worth having"),
        "Ridge regression on examples that a pruner chose, in the limit of many dimensions. Lines"
        " are formulas, each with its best ridge.",
        order=order,
    )
    for place, (name, title, xlabel) in enumerate(
        (
            ("sizes", "The hardest share of many", "examples after pruning"),
            (
                "oversampling",
                f"The hardest {recipe.oversampling_size:,} of ever more",
                "examples drawn for each that stays",
            ),
        )
    ):
        series = {label: (figures[name]["x"], y) for label, y in figures[name]["series"].items()}
        page.curve(
            look.id(f"theory-{name}"),
            title,
            series,
            xlabel,
            "accuracy",
            order=order + 1 + place,
            log_x=True,
        )
    page.map(
        look.id("theory-map"),
        f"Hard or easy: {recipe.map_keep:.0%} kept",
        figures["map"]["phi"],
        figures["map"]["quality"],
        figures["map"]["easy_less_hard"],
        "dimensions over examples before pruning",
        "cosine of generator and truth",
        note="The error of the easiest less that of the hardest: where it is blue, hard examples"
        " are better. They need a good generator and plenty of data.",
        order=order + 3,
    )
    for number, (margin, arms) in enumerate(figures.get("toy", {}).items()):
        page.curve(
            look.id(f"theory-toy-{number}"),
            f"Practice on the toy problem, margin {margin}",
            {arm: (range(len(errors)), errors) for arm, errors in arms.items()},
            "rounds",
            "test error",
            note="Added examples are any (static), near the first classifier's boundary (frozen) or"
            " near the newest one's (adaptive).",
            order=order + 4,
        )
    if "check" in figures:
        found = figures["check"]
        columns = ["rule", "phi", "keep", "rho", "ridge", "limit", "mean", "standard_error", "z"]
        page.table(
            look.id("theory-check"),
            "Formulas against classifiers that were fitted",
            [name.replace("_", " ") for name in columns],
            [[row[name] for name in columns] for row in found["rows"]],
            note=f"{found['settings']} settings: chi-square {found['chi_square']:.1f}, p"
            f" {found['p']:.2f}; largest z {found['largest_z']:.1f}; no standard error above"
            f" {found['largest_share']:.2%} of its error.",
            order=order + 5,
        )
    page.write()


def show_evaluation(result: dict, look: Look) -> None:
    """The table of figures with intervals, and the protocol that fixes them."""
    title, columns, rows = result_table(result)
    look.page.chapter(look.id("evaluation"), look.title("Evaluation"), title, order=look.order)
    look.page.table(
        look.id("evaluation-table"),
        "Generated against held-out real pictures",
        columns,
        rows,
        note="Brackets are 95% intervals. The last two columns have equal counts and compare.",
        order=look.order + 1,
    )
    protocol = [[name, str(value)] for name, value in result["protocol"].items()]
    look.page.table(
        look.id("protocol"),
        "Protocol",
        ["field", "value"],
        protocol,
        note="Only figures with the same protocol compare.",
        order=look.order + 2,
    )
    look.page.write()
