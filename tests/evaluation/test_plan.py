"""The whole of evaluation on real digits: the judge, the figures, their floors and their table."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.errors import UserError
from etude.core.files import to_json
from etude.core.log import Log
from etude.core.run import Run
from etude.data.digits import write_digits
from etude.evaluation.compare import compare
from etude.evaluation.judge import (
    JudgeConfig,
    JudgeRecipe,
    accuracy,
    open_judge,
    run_judge,
    train_judge,
)
from etude.evaluation.plan import EvaluateRecipe, ExtractorConfig, ExtractRecipe, evaluate, extract
from etude.evaluation.sets import ShardPictures, Stages
from etude.jobs import run_recipe
from etude.metrics.intervals import IntervalConfig
from etude.metrics.store import FeatureStore

SMALL = JudgeConfig(images=9_600)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def judge(digits: Path) -> Path:
    return train_judge(digits / "train", SMALL, 0, digits / "judge")


class Noisy:
    """A generator that draws monitor digits of the asked class with noise, or training digits."""

    def __init__(self, digits: Path, noise: float, source: str = "monitor") -> None:
        self.name, self.fingerprint, self.noise = f"noise {noise:g}", f"{source}{noise}", noise
        self.protocol = {"sampler": {"method": "none", "guidance_scale": 2.0}, "rounding": "down"}
        shards = ShardPictures(digits / source, size=16, channels=1)
        self.pictures = shards.read(0, len(shards), Stages())

    def draw(self, indices: np.ndarray, labels: np.ndarray, *, seed: int) -> tuple:
        found = []
        for index, label in zip(indices, labels, strict=True):
            rows = np.flatnonzero(self.pictures.labels == label)
            image = self.pictures.images[rows[(index // 10) % len(rows)]]
            noise = np.random.default_rng(int(index)).normal(size=image.shape) * self.noise
            found.append(np.clip(image + noise, 0, 255).astype(np.uint8))
        return np.stack(found), {}


def recipe(digits: Path, judge: Path, store: Path, **changes) -> EvaluateRecipe:
    fields = {
        "name": "evaluate/test",
        "real": str(digits / "test"),
        "train": str(digits / "train"),
        "generator": "noisy",
        "samples": 200,
        "image_size": 16,
        "extractor": ExtractorConfig(kind="classifier", weights=str(judge)),
        "metrics": ("frechet", "kid", "prdc", "agreement", "memorisation"),
        "store": str(store),
        "interval": IntervalConfig(replicates=60),
    }
    return EvaluateRecipe(**(fields | changes))


def job(tmp_path: Path, made: EvaluateRecipe, generator: Noisy | None) -> dict:
    with Run.open(made, root=tmp_path / "runs") as run:
        act = evaluate if made.kind == "evaluate" else extract
        return act(made, run, generator, Log(run.folder, quiet=True))


def test_the_judge_is_right_about_held_out_digits(digits: Path, judge: Path) -> None:
    assert accuracy(judge, digits / "test") >= 0.97
    pictures = ShardPictures(digits / "monitor", size=16, channels=1).read(0, 200, Stages())
    labels = open_judge(judge).labels(pictures.images)
    assert labels.shape == (200,) and (labels == pictures.labels).mean() >= 0.97


def test_the_judge_is_a_function_of_its_seed(digits: Path, tmp_path: Path) -> None:
    config = JudgeConfig(images=320)
    folders = [
        train_judge(digits / "monitor", config, seed, tmp_path / name)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    one, two, other = ((f / "classifier.safetensors").read_bytes() for f in folders)
    assert one == two != other


def test_a_judge_recipe_leaves_a_judge_in_its_run(digits: Path, tmp_path: Path) -> None:
    made = JudgeRecipe(
        name="judge",
        shards=str(digits / "monitor"),
        held_out=str(digits / "monitor"),
        judge=JudgeConfig(images=640),
    )
    with Run.open(made, root=tmp_path) as run:
        result = run_judge(made, run)
    assert open_judge(run.folder).classes == [str(n) for n in range(10)]
    assert result["held_out_accuracy"] == accuracy(result["judge"], digits / "monitor")


def test_figures_follow_quality_and_the_result_is_json(digits, judge, tmp_path) -> None:
    made = recipe(digits, judge, tmp_path / "store")
    clean = job(tmp_path, made, Noisy(digits, 4))
    noisy = job(tmp_path, made, Noisy(digits, 60))
    to_json(clean)
    name = "Fréchet distance (classifier features)"
    assert list(clean["figures"])[0] == name and "FID" not in clean["figures"]
    for result in (clean, noisy):
        assert result["counts"] == {
            "generated": [400, 200],
            "matched": [200, 200],
            "real": [200] * 2,
        }
        for measured in result["figures"].values():
            for found in measured.values():
                assert found["low"] <= found["value"] <= found["high"]
    # Real digits with little noise are about as far from real digits as real digits are.
    assert clean["figures"][name]["matched"]["low"] < clean["figures"][name]["real"]["high"]
    assert noisy["figures"][name]["generated"]["low"] > clean["figures"][name]["generated"]["high"]
    assert noisy["figures"]["precision"]["generated"]["value"] < 0.9
    assert clean["labels"]["agreement"]["value"] >= 0.95 > noisy["labels"]["agreement"]["value"]
    near = clean["nearest"]["generated"]
    assert near["median nearest distance"] > near["train-train quantile"]
    log = (tmp_path / "runs").glob("*/log.txt")
    assert "real against real (200:200)" in next(log).read_text()

    found = compare(clean, noisy, store=FeatureStore(tmp_path / "store"))
    assert found.paired and found.better(name) == "noise 4"


def test_copies_of_training_pictures_are_seen(digits, judge, tmp_path) -> None:
    made = recipe(digits, judge, tmp_path / "store", metrics=("memorisation",))
    near = job(tmp_path, made, Noisy(digits, 1, "train"))["nearest"]
    assert near["generated"]["median nearest distance"] < near["generated"]["train-train quantile"]
    assert near["real"]["median nearest distance"] > near["real"]["train-train quantile"]


def test_pictures_that_lie_class_by_class_are_matched_over_all_classes(digits, judge, tmp_path):
    """The real pictures as the generated ones, in class folders: as good as real against real."""
    real = ShardPictures(digits / "test", size=16, channels=1)
    found = real.read(0, len(real), Stages())
    for number, (image, label) in enumerate(zip(found.images, found.labels, strict=True)):
        place = tmp_path / "drawn" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(place / f"{number:04d}.png")
    made = recipe(
        digits,
        judge,
        tmp_path / "store",
        generator="",
        generated=str(tmp_path / "drawn"),
        metrics=("prdc",),
        interval=IntervalConfig(replicates=0),
    )
    figures = job(tmp_path, made, None)["figures"]
    for name in ("recall", "coverage"):
        matched, floor = (figures[name][column]["value"] for column in ("matched", "real"))
        assert matched > floor - 0.08


def test_the_same_job_again_reads_the_store(digits, judge, tmp_path) -> None:
    made = recipe(digits, judge, tmp_path / "store", metrics=("frechet",))
    first = job(tmp_path, made, Noisy(digits, 4))
    again = job(tmp_path, made, Noisy(digits, 4))
    assert again["figures"] == first["figures"]
    assert again["images_per_second"] == {"real": {}, "generated": {}}


def test_the_protocol_states_how_pictures_came_about(digits, judge, tmp_path) -> None:
    made = recipe(digits, judge, tmp_path / "store", metrics=("frechet",), weights="ema:0.99")
    protocol = job(tmp_path, made, Noisy(digits, 4))["protocol"]
    assert protocol["guidance"] == '{"guidance_scale": 2.0}'
    assert protocol["sampler"] == '{"method": "none"}'
    assert (protocol["rounding"], protocol["profile"]) == ("down", "ema:0.99")
    assert (protocol["n_real"], protocol["n_generated"], protocol["k"]) == (400, 200, 5)


def test_real_pictures_against_real_pictures_have_the_floors_figures(
    digits, judge, tmp_path
) -> None:
    made = recipe(
        digits,
        judge,
        tmp_path / "store",
        metrics=("frechet", "prdc"),
        generator="",
        generated=str(digits / "monitor"),
    )
    figures = job(tmp_path, made, None)["figures"]
    for measured in figures.values():
        assert measured["matched"]["low"] <= measured["real"]["high"]
        assert measured["real"]["low"] <= measured["matched"]["high"]


def test_a_finished_evaluation_looks_at_its_pictures_again(digits, judge, tmp_path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "drawn").mkdir()
    changes = {"train": "", "generator": "", "generated": str(tmp_path / "drawn")}
    changes |= {"metrics": ("frechet",), "interval": IntervalConfig(replicates=0)}
    made = recipe(digits, judge, tmp_path / "store", **changes)
    values = []
    for darker in (1, 3, 3):
        for number in range(20 if len(values) < 2 else 0):
            noise = rng.integers(0, 256 // darker, (16, 16), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "drawn" / f"{number}.png")
        _, result = run_recipe(made, root=tmp_path / "runs", quiet=True)
        values.append(result["headline"])
    assert values[0] != values[1] == values[2]


def test_extract_fills_the_store_for_a_later_evaluation(digits, judge, tmp_path) -> None:
    fields = recipe(digits, judge, tmp_path / "store").model_dump()
    kept = {n: fields[n] for n in ExtractRecipe.model_fields if n not in ("kind", "expects")}
    made = ExtractRecipe(**kept)
    result = job(tmp_path, made, Noisy(digits, 4))
    assert result["sizes"] == {"real": 400, "generated": 200, "train": 1197}
    later = job(tmp_path, recipe(digits, judge, tmp_path / "store"), Noisy(digits, 4))
    assert later["images_per_second"] == {"real": {}, "generated": {}, "train": {}}
    assert later["sets"] == result["sets"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generated": "x"}, "keep one"),
        ({"train": ""}, "set train=FOLDER"),
        ({"extractor": ExtractorConfig(kind="inception")}, "set judge=FOLDER"),
        ({"generator": "", "generated": "x", "weights": "ema:0.9"}, "weights has no effect"),
    ],
)
def test_settings_that_do_not_fit_are_refused(digits, judge, tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(digits, judge, tmp_path, **changes)


def test_missing_pictures_are_one_sentence(digits, judge, tmp_path) -> None:
    with pytest.raises(UserError, match="none was opened"):
        job(tmp_path, recipe(digits, judge, tmp_path), None)
    with pytest.raises(UserError, match="set generator=RUN"):
        job(tmp_path, recipe(digits, judge, tmp_path, generator=""), None)
    with pytest.raises(UserError, match="too few for k=5"):
        job(tmp_path, recipe(digits, judge, tmp_path, samples=5), Noisy(digits, 4))
