"""The page of the families: its tables are the results', and the command that makes them works."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import families
from etude.core.log import read_metrics
from etude.core.run import load_run
from etude.sampling import open_generator

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_the_newest_row_of_every_study() -> None:
    page = (families.DOCS / families.PAGE).read_text()
    for name, row in families.newest().items():
        stem = name.split("/")[-1]
        shown = page.split(f"<!-- {stem} -->")[1].strip().splitlines()
        assert shown == families.table(row), f"type: python -m benchmarks.families {name}"
        assert f"{row['images']:,}" in page and row["date"][:10] in page
        assert (families.DOCS / f"{stem}.svg").exists()
        for job in row["jobs"]:
            assert f"({stem}-{job}.png)" in page
            assert (families.DOCS / f"{stem}-{job}.png").stat().st_size < 150_000


def test_a_study_becomes_a_row_figures_and_a_table(tiny, tmp_path, monkeypatch) -> None:
    short = {"loop.images": 64, "loop.evaluate_every": 32, "loop.log_every": 32}
    masked = {"model.family": "mdt", "model.depth": 3, "model.decode_layer": 1}
    jobs = {
        "dit": {"recipe": tiny.ldm, "set": short},
        "mdt": {"recipe": tiny.ldm, "set": short | masked},
    }
    study = tmp_path / "two.yaml"
    study.write_text(json.dumps({"kind": "study", "jobs": jobs}))
    (tmp_path / families.PAGE).write_text("# Q?\n<!-- two -->\nold\n<!-- two -->\nend\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "DOCS", tmp_path)
    monkeypatch.setattr(families, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("benchmarks.results.RESULTS", tmp_path / "results")
    for _ in range(2):  # the second time nothing is trained
        assert families.main(str(study)) == 0

    first, second = map(json.loads, (tmp_path / "results/families.jsonl").read_text().splitlines())
    assert first["jobs"] == second["jobs"] and first["images"] == 64
    for job, found in first["jobs"].items():
        folder = next(f for f in Path("runs").iterdir() if _is(f, job))
        recipe, _ = load_run(folder)
        generator = open_generator(folder)
        assert found["parameters"] == sum(p.numel() for p in generator.model.parameters())
        result = json.loads((folder / "result.json").read_text())
        assert found["held_out"][-1] == [64, round(result["held_out_loss"], 4)]
        assert found["constant_predictor"] == round(result["constant_predictor_loss"], 4)
        train = read_metrics(folder / "metrics.jsonl", "train")
        rates = [r["images_per_second"] for r in train]
        assert found["images_per_second"] == pytest.approx(np.mean(rates), abs=0.06)  # of two
        assert found["seconds"] == pytest.approx(sum(32 / rate for rate in rates), abs=0.51)
        passes = 2 if job == "mdt" else 1  # a loss of a pass, for both of them
        drawn = families.losses(recipe, folder)["training"]
        assert drawn == [(r["images_seen"], r["loss"] / passes) for r in train]

        pictures, _ = generator.draw(np.arange(10), np.arange(10), seed=0)
        with Image.open(tmp_path / f"two-{job}.png") as sheet:
            shown = np.asarray(sheet.convert("RGB")).astype(int)
        assert shown.shape == (64 + 4, 10 * 66 + 2, 3)
        cells = [shown[2:66, 2 + 66 * n : 66 + 66 * n] for n in range(10)]
        means = [cell.mean() for cell in cells]
        assert np.corrcoef(means, pictures.mean((1, 2, 3)))[0, 1] > 0.99

    page = (tmp_path / families.PAGE).read_text()
    assert "old" not in page and page.endswith("<!-- two -->\nend\n")
    assert all(line in page for line in families.table(second))
    svg = (tmp_path / "two.svg").read_text()
    labels = re.findall(r">([^<>]+)</text>", svg)
    for name, found in (("DiT", first["jobs"]["dit"]), ("MDTv2", first["jobs"]["mdt"])):
        assert f"{name}  {found['held_out'][-1][1]:.3f}" in labels


def _is(folder: Path, job: str) -> bool:
    recipe, _ = load_run(folder)
    return recipe.kind == "ldm" and recipe.model.family == job
