"""Practice and evaluation on the page: sections made from what their runs wrote; called by jobs.py.

Everything is read from the run's folder, so a resumed job's page shows the whole run.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from etude.core.files import read_json
from etude.core.log import read_metrics
from etude.evaluation.report import result_table

from .pictures import enlarge
from .training import Look

ARMS = ("practice", "static", "omega0", "real")


def show_practice(folder: Path, look: Look) -> None:
    """Monitor accuracy of every arm, the hardest pictures of every round, and the table."""
    page, order = look.page, look.order
    page.chapter(
        look.id("practice"),
        look.title("Practice"),
        "A classifier that learned from generated pictures only, beside its baselines.",
        order=order,
    )
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if r["name"].startswith("practice/")]
    series: dict[str, tuple[list, list]] = {}
    for row in rows:
        steps, values = series.setdefault(row["name"].removeprefix("practice/"), ([], []))
        steps.append(row["step"])
        values.append(row["monitor_accuracy"])
    if series:
        page.curve(
            look.id("practice-accuracy"),
            "Accuracy on the real monitor pictures",
            series,
            "steps",
            "accuracy",
            order=order + 1,
        )
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
    results = {name: folder / "arms" / name / "result.json" for name in ARMS}
    arms = {name: read_json(path) for name, path in results.items() if path.exists()}
    if arms:
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
            note="practice adds guided pictures at plateaus; static has as many, unguided, from "
            "the start; omega0 adds when practice added, unguided; real learns from real training "
            "pictures. Same steps, weights and tuning.",
            order=order + 3,
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
