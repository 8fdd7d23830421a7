"""The examples of docs/how-do-i-add-a-metric-or-a-data-set.md, taken from the page and run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.log import Log
from etude.core.recipe import load_recipe
from etude.core.registry import load_file
from etude.core.run import Run
from etude.evaluation.datasets import open_data_set
from etude.evaluation.generators import GENERATORS, Wanted
from etude.evaluation.planned.running import Plan
from etude.evaluation.sets import Stages
from etude.metrics.extractors import load_extractor
from etude.metrics.registry import NoOptions, Pair, open_metric

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-do-i-add-a-metric-or-a-data-set.md"
SEASONS = ["winter", "summer"]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, written and loaded; a folder sky beside them with 24 pictures."""
    blocks = re.findall(r"```python\n(# (\w+\.py):.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for _, name in blocks] == ["weather.py", "spread.py", "tones.py", "stripes.py"]
    for text, name in blocks:
        (tmp_path / name).write_text(text)
        load_file(tmp_path / name)
    plan = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    (tmp_path / "plan.yaml").write_text(plan)
    rng, rows = np.random.default_rng(0), ["file,words,season\n"]
    (tmp_path / "sky").mkdir()
    for i in range(24):
        image = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "sky" / f"{i}.png")
        rows.append(f"{i}.png,cloud {i},{SEASONS[i % 2]}\n")
    (tmp_path / "sky" / "sky.csv").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_do_what_the_page_says(page: Path) -> None:
    data = open_data_set("weather", page / "sky")
    asked = data.prompts().prompts
    assert [(p.text, p.group) for p in asked[:2]] == [("cloud 0", "winter"), ("cloud 1", "summer")]
    pictures = data.pictures(size=32).read(0, 24, Stages())
    assert pictures.groups == SEASONS * 12

    features = load_extractor("tones")(torch.from_numpy(pictures.images))
    luma = pictures.images @ np.array([0.299, 0.587, 0.114])
    places = luma.reshape(24, 8, 4, 8, 4).mean((2, 4)).reshape(24, 64) / 255.0
    assert abs(features.numpy() - places).mean() < 0.02
    assert abs(features.mean(1).numpy() - places.mean(1)).max() < 0.01

    stripes = GENERATORS.get("stripes").open(Wanted("", options=(("width", 2),)))
    places = np.array([7, 9, 7])
    drawn = stripes.draw(np.arange(3), -np.ones(3), seed=1, captions=["a"] * 3, positions=places)
    assert drawn.shape == (3, 32, 32, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).any()

    metric, name = open_metric("spread")
    kept = torch.ones(2, 24, dtype=torch.bool)
    kept[1, 12:] = False
    pair = Pair(features, features * 0.5, name, NoOptions())
    values = metric.values(pair, 1.0, kept, kept)["spread"]
    np.testing.assert_allclose(values, [0.25, 0.25], rtol=1e-9)
    mixed = metric.values(pair, 1.0, kept[:1], kept[1:])["spread"]
    expected = 0.25 * features[:12].double().numpy().var(0).sum()
    np.testing.assert_allclose(mixed, expected / features.double().numpy().var(0).sum(), rtol=1e-9)


def test_the_plan_of_the_page_runs(page: Path) -> None:
    """Every figure of every season for both models; the wider stripes vary more slowly."""
    recipe = load_recipe("plan.yaml")
    with Run.open(recipe, root=page / "runs") as run:
        plan = Plan(recipe, run, Log(None, quiet=True))
        plan.run()
    rows = plan.table.rows()
    assert {row.model for row in rows} == {"narrow", "wide"}
    assert {row.group for row in rows} == {"", "summer", "winter"}
    assert len({row.metric for row in rows}) == 2 and len(rows) == 12
    assert {(row.n_real, row.n_generated) for row in rows if row.group} == {(12, 20)}
    assert {(row.n_real, row.n_generated) for row in rows if not row.group} == {(24, 40)}
    found = {(row.model, row.group): row.value for row in rows if row.metric == "spread"}
    assert len(found) == 6 and found["wide", ""] > 1.2 * found["narrow", ""]
