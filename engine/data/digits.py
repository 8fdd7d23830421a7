"""scikit-learn's handwritten digits as shards: 1,797 real grey pictures of 8 x 8, no download.

Called by the demo and the tests. E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten
Digits", UCI repository, 1998; scikit-learn ships its test part.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from etude.core.errors import UserError

from .files import new_folder
from .shards import ShardSet, write_shards

TEST, MONITOR = 400, 200
PARTS = ("train", "monitor", "test")


def write_digits(folder: str | Path, *, per_shard: int = 300) -> Path:
    """Writes `train/` (1,197), `monitor/` (200) and `test/` (400) below `folder`, once.

    Each class is sorted by the sha256 of its pixels and cut there, so the split depends on the
    pictures alone and every class keeps its share. Values 0 to 16 become round(v * 255 / 16).

    Returns:
        `folder`. A folder that already holds the three parts is left alone.
    """
    folder = Path(folder)
    if all((folder / part / "index.json").is_file() for part in PARTS):
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits need scikit-learn; type: pip install scikit-learn") from None
    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = [str(digit) for digit in range(10)]
    with new_folder(folder) as draft:
        for part, rows in zip(PARTS, split(pixels, labels), strict=True):
            samples = (_sample(int(row), pixels[row], int(labels[row])) for row in rows)
            write_shards(draft / part, samples, per_shard=per_shard, classes=classes)
    for part in PARTS:
        ShardSet(folder / part, verify=True)
    return folder


def split(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of (train, monitor, test), each in the order of the pixels' sha256.

    Args:
        pixels: (N, 8, 8) uint8.
        labels: (N,) integers.
    """
    hashes = np.array([hashlib.sha256(picture.tobytes()).hexdigest() for picture in pixels])
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    counts = np.bincount(labels)
    tests, monitors = _shares(counts, TEST), _shares(counts, MONITOR)
    for label in range(len(counts)):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(hashes[rows])]
        first, second = tests[label], tests[label] + monitors[label]
        parts[2].extend(rows[:first])
        parts[1].extend(rows[first:second])
        parts[0].extend(rows[second:])
    return tuple(np.array(sorted(part, key=lambda row: hashes[row])) for part in parts)


def _shares(counts: np.ndarray, total: int) -> np.ndarray:
    """`total` divided in proportion to `counts` by largest remainders."""
    exact = counts * total / counts.sum()
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares


def _sample(row: int, picture: np.ndarray, label: int) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return {"key": f"{row:04d}", "image": buffer.getvalue(), "extension": "png", "label": label}
