"""The page of practice: its table is the newest row's, and the command that makes it works."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import practice_seeds
from etude.core.recipe import load_recipe
from etude.jobs import run_recipe
from etude.practice.paired import compare_all

RECIPE = """\
kind: practice
sampler: {{method: ddim, steps: 2, guidance_convention: lambda}}
pictures: {{image_size: 16, crop: none, channels: 1}}
monitor: {digits}/monitor
test: {digits}/test
real_train: {folder}/train
learner: {{model: {{channels: [8]}}, batch: 16}}
schedule: {{steps: 16}}
trigger: {{evaluate_every: 4, patience: 1}}
start_samples: 20
round_samples: 10
max_rounds: 1
probe_samples: 10
arms: [practice, real, omega0, branch]
"""


def test_the_page_shows_the_newest_row_of_the_study() -> None:
    page = (practice_seeds.DOCS / practice_seeds.PAGE).read_text()
    for name, row in practice_seeds.newest().items():
        stem = name.split("/")[-1]
        shown = page.split(f"<!-- {stem} -->")[1].strip().splitlines()
        assert shown == practice_seeds.table(row), (
            f"type: python -m benchmarks.practice_seeds {name}"
        )
        assert (practice_seeds.DOCS / f"{stem}.svg").exists() and f"({stem}.svg)" in page


def test_a_study_becomes_a_row_a_figure_and_a_table(tiny, tmp_path, monkeypatch) -> None:
    values = {"digits": tiny.folder / "digits", "folder": tiny.folder}
    (tmp_path / "practice.yaml").write_text(RECIPE.format(**values))
    jobs = {
        "train": {"recipe": tiny.ldm, "set": {"loop.images": 32, "loop.evaluate_every": 32}},
        "practice": {
            "recipe": str(tmp_path / "practice.yaml"),
            "from": {"generator": "train"},
            "grid": {"seed": [0, 1]},
        },
    }
    study = tmp_path / "seeds.yaml"
    study.write_text(json.dumps({"kind": "study", "jobs": jobs}))
    (tmp_path / "page.md").write_text("words\n<!-- seeds -->\n<!-- seeds -->\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(practice_seeds, "DOCS", tmp_path)
    monkeypatch.setattr(practice_seeds, "PAGE", "page.md")
    monkeypatch.setattr("benchmarks.results.RESULTS", tmp_path)
    monkeypatch.setattr(practice_seeds, "RESULTS", tmp_path)
    assert practice_seeds.main(str(study)) == 0

    row = json.loads((tmp_path / "practice_seeds.jsonl").read_text())
    _, result = run_recipe(load_recipe(str(study)), root=Path("runs"), quiet=True)
    folders = [Path(folder) for name, folder in result["runs"].items() if "practice" in name]
    correct = {
        name: np.stack([np.load(f / "arms" / name / "correct.npz")["test"] for f in folders])
        for name in ("practice", "real", "omega0")
    }
    assert list(row["arms"])[0] == "real" and row["seeds"] == 2
    for name, values in correct.items():
        assert row["arms"][name]["accuracy"][0] == pytest.approx(values.mean(), abs=1e-5)
    for name, gap in compare_all(correct, "practice").items():
        found = row["difference"][f"practice - {name}"]
        assert found["value"] == pytest.approx(gap.value)
        assert found["adjusted_p_value"] == pytest.approx(gap.adjusted_p_value)
    assert len(row["difference"]) == 2  # branches are the scaling curve, not a comparison
    assert practice_seeds.newest()["seeds"] == row
    shown = (tmp_path / "page.md").read_text()
    assert "\n".join(practice_seeds.table(row)) in shown and "| real |" in shown
    assert "branch" not in shown and (tmp_path / "seeds.svg").read_text().count("<svg") == 1
