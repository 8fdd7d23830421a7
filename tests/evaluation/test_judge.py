"""A judge and pictures whose classes are numbered otherwise are brought together by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.run import Run
from etude.data.shards import write_shards
from etude.evaluation.judge import JudgeConfig, accuracy, as_judged, train_judge
from etude.evaluation.plan import EvaluateRecipe, ExtractorConfig, evaluate
from etude.metrics.extractors import Extractor
from etude.metrics.extractors.classifier import save_classifier
from etude.metrics.intervals import IntervalConfig
from etude.models.classifier import Classifier, ClassifierConfig

TINY = JudgeConfig(
    image_size=8,
    model=ClassifierConfig(channels=(8, 16), num_classes=2),
    images=160,
    batch_size=16,
    shift=0,
)


def picture(name: str, seed: int) -> np.ndarray:
    """Cats are dark and dogs bright."""
    low = {"cat": 0, "dog": 160}[name]
    return np.random.default_rng(seed).integers(low, low + 90, (8, 8), dtype=np.uint8)


def shards(folder: Path, classes: list[str], count: int = 24) -> Path:
    folder.mkdir()
    names = [("cat", "dog")[i % 2] for i in range(count)]
    samples = []
    for i, name in enumerate(names):
        Image.fromarray(picture(name, i)).save(folder / "one.png")
        data = (folder / "one.png").read_bytes()
        label = classes.index(name) if classes else i % 2
        samples.append({"key": str(i), "image": data, "extension": "png", "label": label})
    (folder / "one.png").unlink()
    write_shards(folder, samples, classes=classes)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    return train_judge(shards(folder / "train", ["dog", "cat"]), TINY, 0, folder / "judge")


def test_accuracy_goes_by_name(judge: Path, tmp_path: Path) -> None:
    assert accuracy(judge, shards(tmp_path / "same", ["dog", "cat"])) == 1.0
    assert accuracy(judge, shards(tmp_path / "turned", ["cat", "dog"])) == 1.0
    assert accuracy(judge, shards(tmp_path / "more", ["cat", "cow", "dog"][::2])) == 1.0
    with pytest.raises(UserError, match="other has the classes cat, cow, dog and the judge dog, c"):
        accuracy(judge, shards(tmp_path / "other", ["cat", "cow", "dog"]))


def test_labels_are_found_by_name_or_taken_as_they_are() -> None:
    labels = torch.tensor([0, 1, -1, 1])
    judged = ["dog", "cat", "cow"]
    assert as_judged(labels, ["cat", "dog"], judged, "s").tolist() == [1, 0, -1, 0]
    assert as_judged(labels, ["cow", "dog", "cat"], judged, "s").tolist() == [2, 0, -1, 0]
    for classes, of_judge in (
        ([], judged),
        (judged, []),
        (["0", "1"], judged),
        (judged, ["0", "1"]),
    ):
        assert as_judged(labels, classes, of_judge, "s") is labels
    assert as_judged(labels, ["1", "0"], ["0", "1"], "s").tolist() == [1, 0, -1, 0]
    twice = ["crane", "dog", "crane"]
    assert as_judged(labels, twice, list(twice), "s") is labels
    with pytest.raises(UserError, match="s has the classes dog, crane and the judge crane, dog, c"):
        as_judged(labels, ["dog", "crane"], twice, "s")
    with pytest.raises(UserError, match=r"c0, .*, c7 and 2 more and the judge dog, cat, cow; give"):
        as_judged(labels, [f"c{n}" for n in range(10)], judged, "s")


def test_agreement_goes_by_name_and_the_protocol_names_the_judge(judge, tmp_path) -> None:
    real = shards(tmp_path / "real", ["cat", "dog"])
    for name in ("cat", "dog"):
        (tmp_path / "drawn" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(picture(name, 100 + i)).save(tmp_path / "drawn" / name / f"{i}.png")
    features = tmp_path / "features"
    save_classifier(features, Classifier(TINY.model, seed=1).eval(), 8, ["cat", "dog"])
    found = {}
    for of_judge in (str(judge), ""):
        recipe = EvaluateRecipe(
            name="evaluate/test",
            real=str(real),
            train=str(real),
            generated=str(tmp_path / "drawn"),
            extractor=ExtractorConfig(kind="classifier", weights=str(features)),
            judge=of_judge,
            metrics=("frechet", "agreement"),
            store=str(tmp_path / "store"),
            interval=IntervalConfig(replicates=0),
        )
        with Run.open(recipe, root=tmp_path / "runs") as run:
            found[of_judge] = evaluate(recipe, run, None, Log(run.folder, quiet=True))
    named = found[str(judge)]
    assert named["labels"]["agreement"]["value"] == 1.0
    assert named["labels"]["per_class"] == {"dog": 1.0, "cat": 1.0}
    assert named["protocol"]["judge"] == Extractor("classifier", judge).weights_sha256
    for unused in ("training", "judge"):
        assert unused not in found[""]["protocol"]
    assert "training" not in named["protocol"]
