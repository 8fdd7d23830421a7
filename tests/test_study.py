"""Studies: the order and grids of jobs, and two real chains with a table, stopped and resumed."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from etude.core.errors import UserError
from etude.core.recipe import load_recipe, recipe_from_dict
from etude.core.signals import Stopper
from etude.jobs import run_recipe
from etude.study import instances, overrides, summary, table


def study(jobs: dict, **fields):
    return recipe_from_dict({"kind": "study", "jobs": jobs} | fields, name="studies/test")


def labels(jobs: dict) -> list[str]:
    return [instance.label for instance in instances(study(jobs))]


def test_jobs_run_as_written_unless_one_waits_for_a_later_one() -> None:
    free = {"recipe": "r"}
    assert labels({"c": free, "a": free, "b": free}) == ["c", "a", "b"]
    late = {"c": {"recipe": "r", "from": {"x": "b"}}, "a": free, "b": free, "d": free}
    assert labels(late) == ["a", "b", "c", "d"]


def test_a_grid_is_every_combination_and_is_inherited() -> None:
    jobs = {
        "train": {"recipe": "r", "grid": {"optim.lr": [1e-3, 1e-4], "seed": [0, 1]}},
        "look": {"recipe": "s", "from": {"generator": "train"}, "grid": {"samples": [10, 20]}},
    }
    found = labels(jobs)
    pairs = [(0.001, 0), (0.001, 1), (0.0001, 0), (0.0001, 1)]
    assert found[:4] == [f"train[optim.lr={lr}, seed={seed}]" for lr, seed in pairs]
    inherited = "train[optim.lr=0.0001, seed=1]"
    assert len(found) == 4 + 8 and f"look[samples=20, {inherited}]" in found


def test_two_sources_with_one_grid_above_them_agree_on_its_value() -> None:
    jobs = {
        "a": {"recipe": "r", "grid": {"seed": [0, 1, 2]}},
        "b": {"recipe": "r", "from": {"x": "a"}},
        "c": {"recipe": "r", "from": {"x": "a"}},
        "d": {"recipe": "r", "from": {"left": "b", "right": "c"}},
    }
    last = [i for i in instances(study(jobs)) if i.job == "d"]
    assert len(last) == 3  # not nine
    for instance in last:
        left, right = (source for _, source in instance.upstream)
        assert left.upstream == right.upstream


@pytest.mark.parametrize(
    "jobs",
    [
        {"a": {"recipe": "r", "from": {"x": "b"}}, "b": {"recipe": "r", "from": {"x": "a"}}},
        {"a": {"recipe": "r", "from": {"x": "a"}}},
        {"a": {"recipe": "r", "from": {"x": "missing"}}},
    ],
)
def test_jobs_that_wait_for_each_other_are_refused(jobs: dict) -> None:
    with pytest.raises(UserError, match="wait for each other or take from a job that is not there"):
        instances(study(jobs))


def test_overrides_set_grid_and_sources_in_that_order() -> None:
    jobs = {
        "a": {"recipe": "r"},
        "b": {"recipe": "r", "set": {"x": 1, "y": [1, 2]}, "grid": {"x": [5]}, "from": {"z": "a"}},
    }
    made = study(jobs)
    first, second = instances(made)
    runs = {first: Path("runs/a-1")}
    assert overrides(made, second, runs) == ["x=5", "y=[1, 2]", 'z="runs/a-1"']
    assert overrides(study(jobs, seed=3), first, {}) == ["seed=3"]
    jobs["a"]["set"] = {"seed": 9}
    assert overrides(study(jobs, seed=3), instances(study(jobs))[0], {}) == ["seed=9"]


def test_the_table_has_the_headline_of_every_job() -> None:
    results = {"a": {"held_out_loss": 0.123456789, "name": "x", "done": True}}
    results["b"] = {"headline": {"accuracy": 0.5}, "seconds": 3, "arms": {"p": {"n": 3}}}
    columns, rows = table(results)
    assert columns == ["job", "held_out_loss", "accuracy"]
    assert rows == [["a", "0.12346", ""], ["b", "", "0.5"]]
    assert summary(results)[1] == [["a", "held out loss 0.1235"], ["b", "accuracy 0.5"]]


@pytest.fixture(scope="module")
def chain(tiny, tmp_path_factory) -> Path:
    """An autoencoder, and two models in its latents."""
    folder = tmp_path_factory.mktemp("study")
    latent = {"model.in_channels": 2, "model.input_size": 8, "model.patch_size": 2}
    short = {"loop.images": 32, "loop.evaluate_every": 32}
    made = {
        "kind": "study",
        "jobs": {
            "encode": {"recipe": tiny.autoencoder, "set": short},
            "train": {
                "recipe": tiny.ldm,
                "set": short | latent | {"latents.folder": str(folder / "latents")},
                "grid": {"optim.lr": [1e-3, 1e-2]},
                "from": {"autoencoder": "encode"},
            },
        },
    }
    path = folder / "chain.yaml"
    path.write_text(json.dumps(made))  # JSON is YAML
    return path


def test_a_chain_runs_once_and_goes_on_where_it_was(chain, tmp_path) -> None:
    recipe = load_recipe(chain)
    folder, result = run_recipe(recipe, root=tmp_path, quiet=True)
    train = ["train[optim.lr=0.001]", "train[optim.lr=0.01]"]
    assert list(result["jobs"]) == ["encode", *train]
    runs = {path.parent: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert len(runs) == 4
    assert result["jobs"][train[0]]["held_out_loss"] != result["jobs"][train[1]]["held_out_loss"]
    with (folder / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["job"] for row in rows] == list(result["jobs"])
    for row in rows:
        for name, value in result["jobs"][row["job"]].items():
            if name != "images_seen":
                assert float(row[name]) == pytest.approx(value, rel=1e-4)
    text = (folder / "page.html").read_text()
    assert "Autoencoder" in text and "Diffusion model" in text and train[1] in text

    # the study and its last job were not finished: the others are not touched
    last = next(r for r in runs if r != folder and "lr: 0.01" in (r / "recipe.yaml").read_text())
    shutil.rmtree(last)
    (folder / "result.json").unlink()
    _, again = run_recipe(recipe, root=tmp_path, quiet=True)
    assert again == result
    after = {path.parent: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert {r for r in runs if after[r] == runs[r]} == runs.keys() - {last, folder}

    # two studies share the runs they have in common
    shared = load_recipe(chain, ["jobs.train.grid={optim.lr: [0.001]}"])
    _, result = run_recipe(shared, root=tmp_path, quiet=True)
    assert len(list(tmp_path.glob("*/result.json"))) == 5  # the study's own folder alone is new
    assert list(result["jobs"]) == ["encode", train[0]]


def test_a_stopped_job_stops_the_study(chain, tmp_path) -> None:
    recipe = load_recipe(chain, ["max_minutes=0.00001"])
    folder, result = run_recipe(recipe, root=tmp_path, quiet=True)
    assert result == {"stopped": "max_minutes=1e-05", "job": "encode"}
    assert json.loads((folder / "REQUEUE").read_text())["reason"] == "max_minutes=1e-05"
    assert not list(tmp_path.glob("*/result.json"))
    assert Stopper().requested is None
