"""RandAugment: what a position draws, and its operations against Pillow and against formulas.

Agreement with torchvision to the bit is in tests/peers/test_classifiers.py.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from etude.data.randaugment import (
    OPERATIONS,
    RandAugmentConfig,
    apply,
    draw_operations,
    randaugment,
)

CHANCE = np.random.default_rng(0)
IMAGES = torch.from_numpy(CHANCE.integers(20, 200, (6, 3, 16, 16), dtype=np.uint8))
PLUS, MINUS = np.zeros(6, bool), np.ones(6, bool)
POSITIONS = np.arange(6) + 10**10


def pillow(change) -> torch.Tensor:
    """What a function of one Pillow picture makes of each."""
    made = [np.asarray(change(Image.fromarray(i.permute(1, 2, 0).numpy()))) for i in IMAGES]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("magnitude", [0, 10, 17, 30])
def test_bytes_that_are_moved_about_levels_are_pillows(magnitude: int) -> None:
    bits = 8 - round(magnitude / 7.5)
    threshold = 255.0 * (30 - magnitude) / 30
    for name, change in {
        "Posterize": lambda image: ImageOps.posterize(image, bits),
        "Solarize": lambda image: ImageOps.solarize(image, threshold),
        "Equalize": ImageOps.equalize,
        "Identity": lambda image: image,
    }.items():
        assert torch.equal(apply(name, IMAGES, magnitude, PLUS), pillow(change)), name


def test_places_are_those_of_the_formulas() -> None:
    """Translation and shear by whole rows, and a rotation by its inverse map in float64."""
    shift = int(150 / 331 * 16 * 20 / 30)  # 4 pixels
    moved = apply("TranslateX", IMAGES, 20, PLUS, fill=9)
    assert torch.equal(moved[..., shift:], IMAGES[..., :-shift]) and (moved[..., :shift] == 9).all()
    back = apply("TranslateY", IMAGES, 20, MINUS, fill=9)
    assert torch.equal(back[:, :, :-shift], IMAGES[:, :, shift:])
    assert (back[:, :, -shift:] == 9).all()
    sheared = apply("ShearX", IMAGES, 17, PLUS, fill=9)  # row j moves by 0.17 (j + 1/2)
    for row in range(16):
        by = round(0.17 * (row + 0.5))
        expected = torch.full_like(IMAGES[:, :, row], 9)
        expected[..., : 16 - by] = IMAGES[:, :, row, by:]
        assert torch.equal(sheared[:, :, row], expected), row
    turned = apply("Rotate", IMAGES, 17, MINUS, fill=9)
    angle = -np.radians(17.0)
    y, x = np.mgrid[:16, :16] - 7.5
    column = np.rint(np.cos(angle) * x - np.sin(angle) * y + 7.5).astype(int)
    row = np.rint(np.sin(angle) * x + np.cos(angle) * y + 7.5).astype(int)
    inside = (column >= 0) & (column < 16) & (row >= 0) & (row < 16)
    expected = IMAGES.numpy()[:, :, row.clip(0, 15), column.clip(0, 15)]
    assert np.array_equal(turned.numpy(), np.where(inside, expected, 9))


def test_blends_are_those_of_the_formulas() -> None:
    """factor x + (1 - factor) y in float64, within the one level that cutting off may differ by."""
    x = IMAGES.double()
    grey = (x * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).floor()
    kernel = torch.ones(3, 1, 3, 3).double() / 13
    kernel[:, :, 1, 1] = 5 / 13
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = torch.nn.functional.conv2d(x, kernel, groups=3).round()
    others = {
        "Brightness": torch.zeros_like(x),
        "Color": grey,
        "Contrast": grey.mean((1, 2, 3), keepdim=True),
        "Sharpness": smooth,
    }
    for name, other in others.items():
        for negative, factor in ((PLUS, 1 + 0.9 * 12 / 30), (MINUS, 1 - 0.9 * 12 / 30)):
            expected = (factor * x + (1 - factor) * other).clamp(0, 255).floor()
            found = apply(name, IMAGES, 12, negative).double()
            assert (found - expected).abs().max() <= 1, name
            assert (found != expected).double().mean() < 0.05, name


def test_a_position_draws_its_own_operations_in_any_batch() -> None:
    config = RandAugmentConfig(num_ops=2, magnitude=12, fill=7)
    whole = randaugment(IMAGES, POSITIONS, 3, config)
    rows = [4, 1]
    part = randaugment(IMAGES[rows], POSITIONS[rows], 3, config)
    assert torch.equal(part, whole[rows])
    assert not torch.equal(randaugment(IMAGES, POSITIONS, 4, config), whole)
    # The first of two operations is the one that is drawn alone.
    once = randaugment(IMAGES, POSITIONS, 3, RandAugmentConfig(num_ops=1, magnitude=12, fill=7))
    for row in range(6):
        seconds = [
            apply(name, once[row : row + 1], 12, np.array([negative]), 7)
            for name in OPERATIONS
            for negative in (False, True)
        ]
        assert any(torch.equal(second[0], whole[row]) for second in seconds)


def test_operations_of_a_position_are_drawn_apart() -> None:
    """All 28 x 28 pairs of signed operations are equally frequent, in one position and over two."""
    chosen, negative = draw_operations(np.arange(40_000), 5, 2)
    first, second = 2 * chosen + negative
    for one, other in ((first, second), (first[1:], second[:-1])):
        counts = np.bincount(28 * one + other, minlength=784)
        mean = len(one) / 784
        assert ((counts - mean) ** 2 / mean).sum() < 909  # chi-square, 783 degrees, p of 0.001


def test_operations_and_signs_are_drawn_uniformly() -> None:
    """Each operation has its own result on one picture, so results tell what was drawn."""
    count = 4200
    image = IMAGES[:1].expand(count, -1, -1, -1)
    drawn = randaugment(image, np.arange(count), 5, RandAugmentConfig(num_ops=1, magnitude=12))
    found = []
    for number, name in enumerate(OPERATIONS):
        for negative in (False, True) if 1 <= number <= 9 else (False,):
            result = apply(name, IMAGES[:1], 12, np.array([negative]))
            same = int((drawn == result).flatten(1).all(1).sum())
            found.append((same, count / 14 / (2 if 1 <= number <= 9 else 1)))
    assert sum(same for same, _ in found) == count
    # chi-square with 22 degrees of freedom, p of 0.001
    assert 0 < sum((same - mean) ** 2 / mean for same, mean in found) < 48.3


def test_configurations_without_sense_are_refused() -> None:
    for fields in ({"magnitude": 31}, {"fill": 256}, {"num_ops": -1}):
        with pytest.raises(ValidationError):
            RandAugmentConfig(**fields)
