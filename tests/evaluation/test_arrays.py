"""Arrays and archives that are not what they should be are refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest

from etude.core.errors import UserError
from etude.evaluation.sets import ArrayPictures, NpzPictures, Stages

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)


def test_an_array_renamed_to_an_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"no archive of pictures \(it is one array, as numpy.save"):
        NpzPictures(tmp_path / "a.npz")


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES, np.eye(4), r"labels are float64 of shape \(4, 4\); give a whole number"),
        (IMAGES, np.eye(4, dtype=int), r"labels are int64 of shape \(4, 4\)"),
        (IMAGES, np.array([0.0, 1.0, 1.0, 0.0]), r"labels are float64 of shape \(4,\)"),
        (IMAGES, np.array(3), r"labels are int64 of shape \(\)"),
        (IMAGES, np.arange(3), "3 labels for 4 pictures"),
        (IMAGES[:0], np.arange(0), "a.npz holds no pictures"),
        (np.uint8(3), np.arange(1), r"a picture is uint8 of shape \(\)"),
    ],
)
def test_an_archive_of_other_labels_or_of_nothing(tmp_path, pack, images, labels, said) -> None:
    pack(tmp_path / "a.npz", images, labels)
    with pytest.raises(UserError, match=said):
        NpzPictures(tmp_path / "a.npz", classes=["cat", "dog"])


@pytest.mark.parametrize("kind", [np.uint8, np.int32, list])
def test_labels_of_any_whole_numbers_are_taken(kind: type) -> None:
    labels = [1, 0, 1, 1]
    given = labels if kind is list else np.array(labels, kind)
    found = ArrayPictures(IMAGES, labels=given, classes=["cat", "dog"]).read(0, 4, Stages())
    assert found.labels.tolist() == labels and found.groups == ["dog", "cat", "dog", "dog"]
    with pytest.raises(UserError, match="0 labels for 4 pictures"):
        ArrayPictures(IMAGES, labels=[])
    with pytest.raises(UserError, match="arrays holds no pictures"):
        ArrayPictures([])
