"""A finished `etude demo` as a row of results/demo.jsonl: `python -m benchmarks.demo FOLDER`."""

import json
import sys
from datetime import datetime
from pathlib import Path

from etude.core.log import read_metrics
from etude.core.run import load_run
from etude.evaluation.report import show

from .results import RESULTS, machine


def main() -> None:
    recipe, folder = load_run(sys.argv[1])
    result = json.loads((folder / "result.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    first = [*environment["earlier_starts"], environment][0]
    began = datetime.fromisoformat(first["date"]).timestamp()
    train = folder.parent / Path(result["runs"]["train"]).name
    grids = read_metrics(train / "metrics.jsonl", "grid")
    evaluation = result["jobs"]["evaluate"]
    row = {
        "recipe": recipe.name,
        "seconds": round((folder / "result.json").stat().st_mtime - began),
        "seconds_to_80_percent_labelled_as_asked": next(
            (round(g["time"] - began) for g in grids if g["labelled_as_asked"] >= 0.8), None
        ),
        "practice": {n: a["test_accuracy"] for n, a in result["jobs"]["practice"]["arms"].items()},
        "labelled_as_asked": show(evaluation["labels"]["agreement"]),
        "labelled_as_asked_lowest_class": evaluation["labels"]["lowest"],
        "nearest_training_picture": {
            name: evaluation["nearest"]["generated"][name]
            for name in ("median nearest distance", "train-train quantile")
        },
        "figures": {
            name: {pair: show(value) for pair, value in by_pair.items()}
            for name, by_pair in evaluation["figures"].items()
        },
        "protocol": evaluation["protocol_fingerprint"],
    } | machine()
    row["revision"] = environment["revision"]
    with (RESULTS / "demo.jsonl").open("a") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps(row, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
