"""Duplicates and spread against every pair, visited one by one."""

import numpy as np
import pytest

from etude.practice.duplicates import find_duplicates, spread
from etude.practice.pictures import Stored


def stored(pixels: np.ndarray, labels: np.ndarray | None = None) -> Stored:
    return Stored(pixels, np.zeros(len(pixels), np.int64) if labels is None else labels, ["a", "b"])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(float) - b.astype(float)) ** 2)))


def planted(size: int, channels: int) -> Stored:
    """90 pictures of noise, of which some repeat others exactly, nearly, or not quite."""
    chance = np.random.default_rng(size)
    pixels = chance.integers(0, 256, (90, size, size, channels), dtype=np.uint8)
    for place, source, spread_of in (
        (51, 7, 0.0),  # exact, of an earlier one
        (52, 8, 1.2),  # near
        (53, 9, 3.5),  # beyond 2 levels, within 4
        (60, 55, 0.0),  # exact, within the new ones
        (61, 55, 0.0),
        (70, 66, 1.0),  # near, within
        (71, 7, 0.0),  # both: equal to 7 and to 51
    ):
        noise = spread_of * chance.normal(size=pixels[0].shape)
        pixels[place] = np.clip(np.rint(pixels[source] + noise), 0, 255)
    return stored(pixels)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (33, 1), (32, 3), (48, 1)])
@pytest.mark.parametrize("block", [7, 4096])
def test_duplicates_are_those_of_every_pair(size: int, channels: int, block: int) -> None:
    pictures = planted(size, channels)
    pixels, new, earlier = pictures.pixels, np.arange(50, 90), np.arange(0, 50)
    for distance in (0.0, 2.0, 4.0):
        within, outside = {}, {}
        for place, row in enumerate(new):
            gaps = [difference(pixels[row], pixels[other]) for other in range(row)]
            for others, found in ((new[:place], within), (earlier, outside)):
                near = [int(other) for other in others if gaps[other] <= distance]
                if near:
                    found[int(row)] = (near[0], gaps[near[0]])
        found = find_duplicates(pictures, new, earlier, distance=distance, block=block)
        assert (found.near_within, found.near_earlier) == (len(within) / 40, len(outside) / 40)
        pairs = [(row, *match) for each in (outside, within) for row, match in each.items()]
        expected = sorted(pairs, key=lambda pair: (pair[2], pair[0], pair[1]))
        assert [pair[:2] for pair in found.pairs] == [pair[:2] for pair in expected]
        assert [p[2] for p in found.pairs] == pytest.approx([p[2] for p in expected], abs=1e-9)
        assert found.exact_within == 3 / 40 and found.exact_earlier == 2 / 40
    assert (found.new, found.earlier) == (40, 50)
    shown = find_duplicates(pictures, new, earlier, distance=4.0, shown=2).pairs
    assert shown == find_duplicates(pictures, new, earlier, distance=4.0).pairs[:2]


def test_thumbnails_that_agree_are_not_pictures_that_agree() -> None:
    """Fine stripes of opposite phase have one thumbnail: every candidate is refused but the last.

    An equal picture behind many such candidates is still found.
    """
    stripes = np.zeros((32, 32, 1), np.uint8)
    stripes[::2] = 200
    pixels = np.stack([stripes, *[200 - stripes] * 20, stripes])
    found = find_duplicates(stored(pixels), np.array([21]), np.arange(1, 21), distance=2.0)
    assert (found.near_earlier, found.pairs) == (0.0, [])
    found = find_duplicates(stored(pixels), np.array([0]), np.arange(1, 22), distance=2.0)
    assert (found.near_earlier, found.pairs) == (1.0, [(0, 21, 0.0)])


def test_one_picture_again_and_again_is_all_duplicates_but_one() -> None:
    pixels = np.full((600, 16, 16, 1), 77, np.uint8)
    found = find_duplicates(stored(pixels), np.arange(600), np.array([], int), distance=0.5)
    assert found.near_within == found.exact_within == 599 / 600
    assert found.near_earlier == found.exact_earlier == 0.0
    assert all(other == 0 for _, other, _ in found.pairs)


class Counted(Stored):
    """Notes how many pictures are asked for at a time."""

    largest = 0

    def images(self, indices: np.ndarray) -> np.ndarray:
        type(self).largest = max(type(self).largest, len(indices))
        return super().images(indices)


def test_no_more_than_a_block_is_read_at_a_time() -> None:
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (3000, 4, 4, 1), dtype=np.uint8)
    pixels[2000:] = pixels[:1000]
    pictures = Counted(pixels, np.zeros(3000, np.int64), ["a"])
    found = find_duplicates(pictures, np.arange(1500, 3000), np.arange(1500), distance=1.0)
    assert found.near_earlier == found.exact_earlier == 1000 / 1500
    assert 0 < Counted.largest <= 512


def test_spread_is_the_root_mean_square_over_all_pairs_of_a_class() -> None:
    chance = np.random.default_rng(4)
    pixels = chance.integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
    labels = np.array([0] * 9 + [1] * 13 + [2])
    pictures = Stored(pixels, labels, ["a", "b", "c"])
    means = []
    for label in (0, 1):  # class 2 has no pair
        rows = np.flatnonzero(labels == label)
        squares = [difference(pixels[i], pixels[j]) ** 2 for i in rows for j in rows if i < j]
        means.append(np.mean(squares))
    expected = np.sqrt(np.mean(means))
    for block in (5, 1024):
        assert spread(pictures, np.arange(23), block) == pytest.approx(expected, rel=1e-6)
    assert spread(pictures, np.array([22])) == 0.0


def test_spread_falls_when_modes_are_lost_and_not_when_grain_is() -> None:
    chance = np.random.default_rng(5)
    modes = np.kron(chance.integers(40, 216, (6, 4, 4, 1)), np.ones((1, 8, 8, 1)))
    grain = chance.normal(0, 20, (120, 32, 32, 1))

    def spread_of(kinds: int, amount: float) -> float:
        pixels = modes[np.arange(120) % kinds] + amount * grain
        return spread(stored(pixels.clip(0, 255).astype(np.uint8)), np.arange(120))

    assert spread_of(1, 1.0) < 0.5 * spread_of(2, 1.0)
    assert spread_of(6, 0.0) > 0.95 * spread_of(6, 1.0)
