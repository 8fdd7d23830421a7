"""A pool drawn again equals itself, says so when it does not, and is read by others."""

import csv
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.signals import Stopper, StopRequested
from etude.data.pool import Pool
from etude.practice.rebuild import export, rebuild

ARMS = ["practice", {"kind": "prune", "prune": {"score": "margin", "oversampling": 2}}]
QUIET, CPU = Log(None, quiet=True), torch.device("cpu")


@pytest.fixture(scope="module")
def pools(toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rebuild")
    toy.run(toy.recipe(arms=ARMS, real_train="", max_rounds=2, chunk=32), root)
    return root / "toy" / "pools"


@pytest.mark.parametrize("name", ["practice", "prune-margin", "prune-margin.candidates"])
def test_seeds_and_learners_alone_give_the_same_pool(pools, toy, tmp_path, name) -> None:
    sent = shutil.copytree(pools / name, tmp_path / name, ignore=shutil.ignore_patterns("*.tar*"))
    found = rebuild(sent, tmp_path / "to", toy.generator, CPU, QUIET)
    old, new = Pool(pools / name), Pool(tmp_path / "to")
    assert (found.pictures, found.identical, found.compared) == (len(old), len(old), 0)
    assert new.parts == old.parts
    rows = np.arange(len(old))
    assert np.array_equal(new.images(rows), old.images(rows))
    assert np.array_equal(new.seed_indices(rows), old.seed_indices(rows))
    weight = sum(path.stat().st_size for path in sent.rglob("*.tar"))
    assert weight == 0 and "100.00%" in str(found)


def test_differences_are_counted_picture_by_picture(pools, toy, tmp_path) -> None:
    """A generator that darkens two pixels of every picture of one class, and says nothing."""

    def draw(inner, indices, labels, **more):
        images, telemetry = inner(indices, labels, **more)
        images = images.copy()
        images[labels == 1, 0, :2] = images[labels == 1, 0, :2] // 2 + 60
        return images, telemetry

    found = rebuild(pools / "practice", tmp_path / "to", lambda: toy.around(draw), CPU, QUIET)
    old, new = (Pool(folder) for folder in (pools / "practice", tmp_path / "to"))
    rows = np.arange(len(old))
    gap = np.abs(old.images(rows).astype(int) - new.images(rows))
    assert found.compared == found.pictures == len(old)
    assert found.identical == int((gap == 0).all(axis=(1, 2, 3)).sum()) < len(old)
    assert found.largest == gap.max() and found.differing == pytest.approx((gap > 0).mean())


def test_an_interrupted_rebuild_goes_on(pools, toy, tmp_path) -> None:
    drawn = []

    def draw(inner, indices, labels, **more):
        drawn.append(int(indices[0]))
        return inner(indices, labels, **more)

    def counted():
        return toy.around(draw)

    class After(Stopper):
        left = 3

        @property
        def requested(self) -> str | None:
            self.left -= 1
            return "poll" if self.left < 0 else None

    log = Log(None, quiet=True)
    log.on_advance = After().check
    with pytest.raises(StopRequested):
        rebuild(pools / "practice", tmp_path / "to", counted, CPU, log)
    assert len(Pool(tmp_path / "to")) == 0
    found = rebuild(pools / "practice", tmp_path / "to", counted, CPU, QUIET)
    assert found.identical == found.pictures == len(Pool(tmp_path / "to"))
    assert len(drawn) == len(set(drawn)) == len(Pool(pools / "practice").parts)


def test_what_cannot_be_drawn_again_is_said_in_one_sentence(pools, toy, tmp_path) -> None:
    other = dataclasses.replace(toy.generator(), fingerprint="another")
    with pytest.raises(UserError, match="was drawn by toy and this generator is another"):
        rebuild(pools / "practice", tmp_path / "a", lambda: other, CPU, QUIET)
    with pytest.raises(UserError, match="is the pool itself"):
        rebuild(pools / "practice", pools / "practice", toy.generator, CPU, QUIET)
    sent = shutil.copytree(pools / "practice", tmp_path / "sent")
    shutil.rmtree(sent / "learners")
    with pytest.raises(UserError, match="send the pool's folder learners/ too"):
        rebuild(sent, tmp_path / "b", toy.generator, CPU, QUIET)
    (sent / "origin.json").unlink()
    with pytest.raises(UserError, match="has no origin.json"):
        rebuild(sent, tmp_path / "c", toy.generator, CPU, QUIET)


def test_export_is_a_folder_per_class_with_a_table(pools, toy, tmp_path) -> None:
    pool = Pool(pools / "practice")
    assert export(pools / "practice", tmp_path / "out", QUIET) == len(pool)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b", "c", "metadata.csv"}
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for index, row in enumerate(rows):
        image = np.asarray(Image.open(tmp_path / "out" / row["file_name"]))
        assert np.array_equal(image, pool.images([index])[0, ..., 0])
        assert int(row["label"]) == index % 3 and row["class"] == "abc"[index % 3]
        assert int(row["round"]) == pool.rounds_of([index])[0] and int(row["seed_index"]) == index
        entropy = pool.entropies([index])[0]
        assert (row["entropy"] == "") == bool(np.isnan(entropy)) == (row["learner"] == "")
        assert row["entropy"] == "" or float(row["entropy"]) == pytest.approx(entropy, rel=1e-5)
    with pytest.raises(UserError, match="is not empty"):
        export(pools / "practice", tmp_path / "out", QUIET)
