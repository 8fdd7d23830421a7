"""Refuses what would make practice's result meaningless; called by rounds.py before the first step.

Two things: class index c must mean the same class to the generator and to the real splits, and no
test picture may be, exactly or nearly, among the pictures that the generator was trained on.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from etude.core.errors import UserError

from .pictures import Pictures, chunks

THUMBNAIL = 16  # pixels; a block average never enlarges a distance, so it only rules pairs out


def same_classes(
    generator: Sequence[str], real: Sequence[str], generator_name: str, split: str
) -> None:
    """Refuse when class names differ by index.

    Args:
        generator, real: class names in index order; an empty list means the names are not known.
        generator_name, split: what the message calls them.
    """
    if not generator or not real or list(generator) == list(real):
        return
    if len(generator) != len(real):
        raise UserError(
            f"{generator_name} draws {len(generator)} classes and {split} holds {len(real)}: give "
            "a split with the generator's classes"
        )
    index = next(i for i, (a, b) in enumerate(zip(generator, real, strict=True)) if a != b)
    raise UserError(
        f"class {index} is {generator[index]!r} to {generator_name} but {real[index]!r} in {split}:"
        " rewrite the split with its classes in the generator's order"
    )


def overlap(
    test: Pictures, training: Pictures, distance: float = 2.0, batch: int = 512
) -> list[tuple[int, int]]:
    """Pairs (test index, training index) that show the same picture, exactly or nearly.

    Args:
        test, training: sets of pictures of one size.
        distance: the root mean square difference, in levels of 255, up to which two pictures are
            the same; 0 finds identical ones only.

    Returns:
        At most one training picture per test picture, in test order. Pairs are looked for among
        thumbnails, whose distance is never above that of the pictures, and confirmed on the whole
        pictures.
    """
    exact = _hashes(training, batch)
    found: dict[int, int] = {}
    for rows in chunks(np.arange(len(test)), batch):
        for row, image in zip(rows, test.images(rows), strict=True):
            if (match := exact.get(_hash(image))) is not None:
                found[int(row)] = match
    if distance > 0:
        _find_near(test, training, distance, batch, found)
    return sorted(found.items())


def refuse(pairs: Sequence[tuple[int, int]], total: int, test_name: str, other_name: str) -> None:
    """Raise a `UserError` that names the first pair of an `overlap` with `total` test pictures."""
    if pairs:
        test_index, other_index = pairs[0]
        raise UserError(
            f"{len(pairs)} of {total} pictures of {test_name} are (nearly) among {other_name}, "
            f"first number {test_index} (there number {other_index}): test on pictures that nothing"
            " before the test has seen"
        )


def _hash(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


def _hashes(pictures: Pictures, batch: int) -> dict[bytes, int]:
    table: dict[bytes, int] = {}
    for rows in chunks(np.arange(len(pictures)), batch):
        for row, image in zip(rows, pictures.images(rows), strict=True):
            table.setdefault(_hash(image), int(row))
    return table


def thumbnails(images: np.ndarray) -> Tensor:
    """(B, D) float32 block averages, scaled so that squared distances are per-pixel means.

    A thumbnail has 16 pixels a side or the next number above that divides the side evenly.
    """
    pixels, side = torch.from_numpy(images).permute(0, 3, 1, 2).float(), images.shape[1]
    largest = max(1, side // THUMBNAIL)
    if (factor := next(f for f in range(largest, 0, -1) if side % f == 0)) > 1:
        pixels = torch.nn.functional.avg_pool2d(pixels, factor)
    flat = pixels.flatten(1)
    return flat / flat.shape[1] ** 0.5


def _find_near(
    test: Pictures, training: Pictures, distance: float, batch: int, found: dict[int, int]
) -> None:
    """Adds near pairs to `found`; the training set is read once."""
    small = torch.cat(
        [thumbnails(test.images(rows)) for rows in chunks(np.arange(len(test)), batch)]
    )
    slack = 0.05 * distance**2 + 0.1  # float32 cancellation; candidates are confirmed exactly
    for columns in chunks(np.arange(len(training)), batch):
        images = training.images(columns)
        gaps = torch.cdist(small, thumbnails(images)).square()
        for row, column in torch.nonzero(gaps <= distance**2 + slack).tolist():
            if row not in found:
                difference = test.images(np.array([row]))[0].astype(np.float64) - images[column]
                if np.sqrt(np.mean(difference**2)) <= distance:
                    found[row] = int(columns[column])
