"""Sets of pictures: shards, folders and generators give the same kind of thing."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.errors import UserError
from etude.data.shards import write_shards
from etude.evaluation.sets import (
    FolderPictures,
    GeneratedPictures,
    ShardPictures,
    Stages,
    open_pictures,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 10, 10), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def shards(folder: Path, images: list[np.ndarray]) -> Path:
    samples = (
        {"key": f"s{i}", "image": png(image), "extension": "png", "label": i % 2}
        for i, image in enumerate(images)
    )
    write_shards(folder, samples, per_shard=3, classes=["even", "odd"])
    return folder


def files(folder: Path, images: list[np.ndarray]) -> Path:
    for i, image in enumerate(images):
        path = folder / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return folder


def test_shards_and_files_hold_the_same_pictures(tmp_path) -> None:
    one = open_pictures(shards(tmp_path / "a", list(IMAGES)), channels=1)
    two = open_pictures(files(tmp_path / "b", list(IMAGES)), channels=1)
    assert isinstance(one, ShardPictures) and isinstance(two, FolderPictures)
    assert len(one) == len(two) == 7 and one.classes == two.classes == ["even", "odd"]
    first = one.read(2, 6, Stages())
    np.testing.assert_array_equal(first.images[..., 0], IMAGES[2:6])
    assert first.keys == ["s2", "s3", "s4", "s5"] and first.labels.tolist() == [0, 1, 0, 1]
    assert first.groups == ["even", "odd", "even", "odd"]
    second = two.read(0, 7, Stages())
    np.testing.assert_array_equal(second.images[..., 0], IMAGES[[0, 2, 4, 6, 1, 3, 5]])
    assert second.keys[4] == "odd/1.png" and second.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_labels_of_a_folder_follow_the_real_classes(tmp_path) -> None:
    found = FolderPictures(files(tmp_path, list(IMAGES)), channels=1, classes=["odd", "other"])
    assert found.read(0, 7, Stages()).labels.tolist() == [-1, -1, -1, -1, 0, 0, 0]


def test_a_table_names_the_pictures_and_their_classes(tmp_path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(IMAGES[i]))
    plain = FolderPictures(tmp_path, channels=1)
    assert len(plain) == 3 and not plain.classes
    (tmp_path / "metadata.csv").write_text("file_name,label\n2.png,odd\n0.png,even\n")
    found = FolderPictures(tmp_path, channels=1)
    assert found.classes == ["even", "odd"] and len(found) == 2
    read = found.read(0, 2, Stages())
    assert read.keys == ["0.png", "2.png"] and read.labels.tolist() == [0, 1]
    turned = FolderPictures(tmp_path, channels=1, classes=["odd", "even"])
    assert turned.read(0, 2, Stages()).labels.tolist() == [1, 0]
    (tmp_path / "metadata.csv").write_text("file_name,label\n2.png,even\n0.png,odd\n")
    assert FolderPictures(tmp_path, channels=1).fingerprint != found.fingerprint
    (tmp_path / "metadata.csv").write_bytes(b"file_name,label\n2.png,\xe9t\xe9\n")
    assert FolderPictures(tmp_path, channels=1).classes == ["\ufffdt\ufffd"]
    (tmp_path / "metadata.csv").write_text("file_name,label\n2.png,even\n0.png,odd\n")
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match="metadata.csv names 2.png, which is not there"):
        FolderPictures(tmp_path)


def test_fingerprints_follow_content_and_form(tmp_path) -> None:
    folder = files(tmp_path / "a", list(IMAGES))
    plain = FolderPictures(folder, channels=1).fingerprint
    assert FolderPictures(folder, channels=1).fingerprint == plain
    assert FolderPictures(folder, channels=3).fingerprint != plain
    assert FolderPictures(folder, channels=1, size=8).fingerprint != plain
    (folder / "even" / "0.png").write_bytes(png(255 - IMAGES[0]))
    assert FolderPictures(folder, channels=1).fingerprint != plain


def test_pictures_are_fitted_by_their_central_square(tmp_path) -> None:
    wide = np.zeros((10, 20), np.uint8)
    wide[:, 5:15] = IMAGES[0]
    found = ShardPictures(shards(tmp_path, [wide, IMAGES[1]]), size=10, channels=1)
    images = found.read(0, 2, Stages()).images
    np.testing.assert_array_equal(images[..., 0], IMAGES[:2])
    smaller = ShardPictures(tmp_path, size=5, channels=1).read(1, 2, Stages()).images[0, :, :, 0]
    expected = Image.fromarray(IMAGES[1]).resize((5, 5), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(smaller, np.asarray(expected))


def test_unequal_sizes_need_image_size(tmp_path) -> None:
    found = ShardPictures(shards(tmp_path, [IMAGES[0], IMAGES[1][:8]]), channels=1)
    with pytest.raises(UserError, match=r"s1 is 10 x 8 .* set image_size"):
        found.read(0, 2, Stages())


def test_a_broken_picture_is_named_and_never_skipped(tmp_path) -> None:
    folder = files(tmp_path, list(IMAGES))
    (folder / "odd" / "3.png").write_bytes(png(IMAGES[3])[:-20])
    with pytest.raises(UserError, match="odd/3.png cannot be used"):
        FolderPictures(folder, channels=1).read(0, 7, Stages())


def test_no_pictures_and_no_folder(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no .png"):
        open_pictures(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        open_pictures(tmp_path / "no")


class Ramp:
    """Picture i of label l is filled with 10 i + l."""

    name, fingerprint, protocol = "ramp", "f", {"rounding": "half even"}

    def draw(self, indices: np.ndarray, labels: np.ndarray, *, seed: int) -> tuple:
        values = (10 * indices + labels).astype(np.uint8)
        return np.broadcast_to(values[:, None, None, None], (len(indices), 4, 4, 1)), {}


def test_a_generator_is_asked_for_classes_in_turn() -> None:
    found = GeneratedPictures(Ramp(), 9, seed=3, classes=["a", "b", "c"])
    block = found.read(4, 8, Stages())
    assert block.images[:, 0, 0, 0].tolist() == [41, 52, 60, 71]
    assert block.labels.tolist() == [1, 2, 0, 1] and block.groups == ["b", "c", "a", "b"]
    assert block.keys[0] == "3/000000004"
    others = [
        GeneratedPictures(Ramp(), 9, seed=4, classes=["a", "b", "c"]),
        GeneratedPictures(Ramp(), 8, seed=3, classes=["a", "b", "c"]),
        GeneratedPictures(Ramp(), 9, seed=3, classes=["a", "b"]),
    ]
    assert len({found.fingerprint, *(other.fingerprint for other in others)}) == 4
