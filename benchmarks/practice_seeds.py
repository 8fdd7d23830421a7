"""Practice against its baselines over seeds: `python -m benchmarks.practice_seeds`.

Runs the study `studies/practice_seeds` (finished jobs are kept), pairs every arm's correctness on
the same real test pictures, and appends one row to results/practice_seeds.jsonl. The interval
covers repeated draws of test pictures and of seeds; all seeds share one generator.
"""

import json
from pathlib import Path

import numpy as np

from etude.core.recipe import fingerprint, load_recipe
from etude.jobs import run_recipe
from etude.practice.paired import paired_interval

from .results import RESULTS, machine

STUDY = "studies/practice_seeds"


def main() -> None:
    study = load_recipe(STUDY)
    _, result = run_recipe(study)
    folders = [Path(f) for label, f in result["runs"].items() if label.startswith("practice[")]
    arms = sorted(path.name for path in (folders[0] / "arms").iterdir())
    correct = {
        arm: np.stack([np.load(f / "arms" / arm / "correct.npz")["correct"] for f in folders])
        for arm in arms
    }
    row = {
        "study": STUDY,
        "fingerprint": fingerprint(study),
        "seeds": len(folders),
        "test_pictures": correct[arms[0]].shape[1],
        "pictures": [
            json.loads((f / "result.json").read_text())["arms"]["practice"]["samples"]
            for f in folders
        ],
        "accuracy": {arm: [round(a, 4) for a in c.mean(1).tolist()] for arm, c in correct.items()},
        "difference": {
            f"practice - {other}": vars(paired_interval(correct["practice"], correct[other]))
            for other in arms
            if other != "practice"
        },
    } | machine()
    with (RESULTS / "practice_seeds.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
