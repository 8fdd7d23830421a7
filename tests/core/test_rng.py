"""Philox known answers, statistics of the draws, and permutations that are permutations."""

import numpy as np
import pytest
import torch
from scipy import stats

from etude.core import rng
from etude.kernels.philox import philox_rounds

ANSWERS = [  # Random123's kat_vectors, philox4x32 with 10 rounds: key, counter, output
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("key, counter, expected", ANSWERS)
def test_known_answers_in_numpy_and_torch(key, counter, expected):
    as_numpy = philox_rounds(key, tuple(np.full(1, c, np.uint64) for c in counter))
    as_torch = philox_rounds(key, tuple(torch.full((1,), c, dtype=torch.int64) for c in counter))
    assert tuple(int(word[0]) for word in as_numpy) == expected
    assert tuple(int(word[0]) for word in as_torch) == expected


def test_counter_is_position_and_block():
    position = (7 << 32) + 5
    direct = philox_rounds((3, 9), tuple(np.full(1, c, np.uint64) for c in (5, 7, 2, 0)))
    words = rng.bits(3, 9, np.array([position]), 12)[0, 8:12]
    assert [int(word[0]) for word in direct] == words.tolist()


def test_values_do_not_depend_on_the_batch():
    positions = np.array([0, 5, 1 << 40, 123456789])
    together = rng.normal(1, 2, positions, (3, 5))
    alone = torch.cat([rng.normal(1, 2, positions[i : i + 1], (3, 5)) for i in range(4)])
    assert torch.equal(together, alone)
    prefix = rng.uniform(1, 2, positions, 3)
    assert np.array_equal(prefix, rng.uniform(1, 2, positions, 7)[:, :3])


def test_normal_is_box_muller_of_the_same_bits():
    words = rng.bits(4, 8, np.array([11]), 8)[0].astype(np.float64)
    expected = []
    for first, second in words.reshape(-1, 2):
        radius = np.sqrt(-2 * np.log((first // 256 + 1) / 2**24))
        angle = 2 * np.pi * (second // 256) / 2**24
        expected += [radius * np.cos(angle), radius * np.sin(angle)]
    got = rng.normal(4, 8, np.array([11]), (8,))[0].double().numpy()
    assert np.abs(got - expected).max() < 2e-6


def test_draws_pass_distribution_tests():
    positions = np.arange(20_000)
    assert stats.kstest(rng.normal(0, 8, positions, (1,)).ravel().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(rng.uniform(0, 7, positions).ravel(), "uniform").pvalue > 1e-3
    counts = np.bincount(rng.integers(0, 2, positions, 10), minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3
    streams = [rng.normal(0, stream, positions, (1,)).ravel().numpy() for stream in (1, 2)]
    assert abs(np.corrcoef(streams)[0, 1]) < 0.03


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1437])
def test_permutation_covers_every_index_once(size):
    for turn in range(3):
        assert sorted(rng.permute(np.arange(size), size, 7, 1, turn)) == list(range(size))


def test_permutations_of_different_turns_and_seeds_differ():
    index = np.arange(1000)
    base = rng.permute(index, 1000, 0, 1, 0)
    for other in (rng.permute(index, 1000, 0, 1, 1), rng.permute(index, 1000, 1, 1, 0)):
        assert (base == other).mean() < 0.01
    assert abs(stats.spearmanr(index, base).statistic) < 0.1


def test_integers_honour_a_bound_per_position():
    bounds = np.arange(1, 500)
    drawn = rng.integers(0, 11, np.arange(499), bounds)
    assert (drawn >= 0).all() and (drawn < bounds).all() and drawn.max() > 300
