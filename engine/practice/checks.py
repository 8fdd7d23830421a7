"""Refuses what would make practice's result meaningless; called by rounds.py before the first step.

Two things: class index c must mean the same class to the generator and to the real splits, and no
test picture may be, exactly or nearly, among the pictures that the generator was trained on.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from etude.core.errors import UserError

from .scores import Pictures, chunks

THUMBNAIL = 16  # pixels; a block average never enlarges a distance, so it only rules pairs out


def same_classes(generator: Sequence[str], real: Sequence[str], generator_name: str, split: str
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
    index = next(i for i, (a, b) in enumerate(zip(generator, real)) if a != b)
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
        for row, image in zip(rows, test.images(rows)):
            if (match := exact.get(_hash(image))) is not None:
                found[int(row)] = match
    if distance > 0:
        _find_near(test, training, distance, batch, found)
    return sorted(found.items())


def refuse_overlap(
    test: Pictures, training: Pictures, distance: float, test_name: str, training_name: str
) -> None:
    """Raise a `UserError` that names the first test picture the generator was trained on."""
    pairs = overlap(test, training, distance)
    if pairs:
        test_index, training_index = pairs[0]
        raise UserError(
            f"{len(pairs)} of {len(test)} pictures of {test_name} are (nearly) among the "
            f"generator's training pictures in {training_name}, first number {test_index} (there "
            f"number {training_index}): test on pictures the generator has never seen"
        )


def _hash(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


def _hashes(pictures: Pictures, batch: int) -> dict[bytes, int]:
    table: dict[bytes, int] = {}
    for rows in chunks(np.arange(len(pictures)), batch):
        for row, image in zip(rows, pictures.images(rows)):
            table.setdefault(_hash(image), int(row))
    return table


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """(B, D) float32 block averages, scaled so that squared distances are per-pixel means."""
    side = images.shape[1]
    pixels = images.astype(np.float32)
    if side > THUMBNAIL and side % THUMBNAIL == 0:
        block = side // THUMBNAIL
        shape = (len(images), THUMBNAIL, block, THUMBNAIL, block, images.shape[-1])
        pixels = pixels.reshape(shape).mean(axis=(2, 4))
    flat = pixels.reshape(len(images), -1)
    return flat / np.sqrt(flat.shape[1])


def _find_near(
    test: Pictures, training: Pictures, distance: float, batch: int, found: dict[int, int]
) -> None:
    """Adds near pairs to `found`; every picture of the training set is read once per call."""
    test_small = np.concatenate(
        [_thumbnails(test.images(rows)) for rows in chunks(np.arange(len(test)), batch)]
    )
    test_square = (test_small**2).sum(axis=1)
    slack = 0.05 * distance**2 + 0.1  # float32 cancellation; candidates are confirmed exactly
    for columns in chunks(np.arange(len(training)), batch):
        images = training.images(columns)
        small = _thumbnails(images)
        square = test_square[:, None] + (small**2).sum(axis=1) - 2.0 * test_small @ small.T
        for row, column in np.argwhere(square <= distance**2 + slack):
            if int(row) in found:
                continue
            picture = test.images(np.array([row]))[0].astype(np.float64)
            gap = np.sqrt(np.mean((picture - images[column]) ** 2))
            if gap <= distance:
                found[int(row)] = int(columns[column])
