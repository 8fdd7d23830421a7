"""The digits on disk are scikit-learn's, split once for all by content, class by class."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from etude.data.digits import split, write_digits
from etude.data.shards import ShardSet


def test_the_three_parts_are_all_digits_once(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    values, labels = load_digits(return_X_y=True)
    seen: list[int] = []
    for part, size in (("train", 1197), ("monitor", 200), ("test", 400)):
        data = ShardSet(folder / part, verify=True)
        assert len(data) == size and data.classes == [str(n) for n in range(10)]
        share = np.bincount(data.labels, minlength=10) / size
        assert abs(share - np.bincount(labels) / 1797).max() < 1 / size + 1e-9
        for number in range(size):
            sample = data[number]
            row = int(sample.key)
            pixels = np.asarray(Image.open(io.BytesIO(sample.data))).astype(int)
            assert abs(pixels - values[row].reshape(8, 8) * 255 / 16).max() <= 0.5
            assert sample.label == labels[row]
            seen.append(row)
    assert sorted(seen) == list(range(1797))
    stamp = (folder / "train" / "000000.tar").stat().st_mtime_ns
    write_digits(folder)
    assert (folder / "train" / "000000.tar").stat().st_mtime_ns == stamp


def test_the_split_follows_content_not_order() -> None:
    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    assert len({picture.tobytes() for picture in pixels}) == 1797, "equal pictures may be split"
    shuffled = np.random.default_rng(0).permutation(1797)
    for part, other in zip(
        split(pixels, labels), split(pixels[shuffled], labels[shuffled]), strict=True
    ):
        assert (part == shuffled[other]).all()
