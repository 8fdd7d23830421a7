"""Every pass shows every sample once, seekably, for both orders; a growing pool never rewrites."""

import numpy as np
import pytest

from etude.core.errors import UserError
from etude.data.order import Order, PoolOrder, StoredOrder

SIZES = [5, 1, 7, 3, 4, 9, 2]
KINDS = ["global", "windowed(shards=2)", "windowed(shards=3)", "windowed(shards=100)"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_pass_covers_every_sample_once(kind: str, seed: int) -> None:
    order = Order(sum(SIZES), seed, kind, shard_sizes=SIZES)
    size = order.size
    passes = order.index(np.arange(size * 6)).reshape(6, size)
    assert (np.sort(passes, axis=1) == np.arange(size)).all()
    assert len({tuple(p) for p in passes}) == 6, "passes repeat the same permutation"


@pytest.mark.parametrize("kind", KINDS)
def test_any_position_is_found_alone(kind: str) -> None:
    order = Order(sum(SIZES), 3, kind, shard_sizes=SIZES)
    whole = order.index(np.arange(200))
    alone = [
        int(Order(sum(SIZES), 3, kind, shard_sizes=SIZES).index(np.array([p]))[0])
        for p in range(0, 200, 7)
    ]
    assert alone == whole[::7].tolist()
    mixed = np.array([150, 3, 77, 150, 31, 30])
    assert (order.index(mixed) == whole[mixed]).all()


def test_a_window_reads_only_its_shards() -> None:
    sizes = [10] * 12
    order = Order(120, 1, "windowed(shards=3)", shard_sizes=sizes)
    shards = order.index(np.arange(240)) // 10
    windows = [set(shards[start : start + 30]) for start in range(0, 240, 30)]
    assert all(len(window) == 3 for window in windows)
    assert set.union(*windows[:4]) == set(range(12))
    assert windows[0] != {0, 1, 2} or windows[4] != {0, 1, 2}, "shards are never permuted"
    inside = order.index(np.arange(30)) // 10
    assert len(set(inside[:10])) > 1, "samples of a window are not mixed"


def test_one_window_is_permuted_anew_in_each_pass() -> None:
    order = Order(40, 1, "windowed(shards=1)", shard_sizes=[40])
    passes = order.index(np.arange(160)).reshape(4, 40)
    assert len({tuple(one) for one in passes}) == 4


def test_a_large_order_is_seekable_and_uniform() -> None:
    order = Order(1_281_167, 0)
    late = order.index(np.arange(10**12, 10**12 + 2000))
    assert len(set(late.tolist())) == 2000
    first = order.index(np.arange(20_000)) / 1_281_167
    # Mean of n uniforms: 1/2 with deviation 1/sqrt(12 n); five deviations.
    assert abs(first.mean() - 0.5) < 5 / np.sqrt(12 * 20_000)


def test_pool_order_keeps_the_past_and_draws_evenly() -> None:
    positions = np.arange(40_000)
    short, long = PoolOrder(5, [(0, 100)]), PoolOrder(5, [(0, 100), (20_000, 400)])
    a, b = short.index(positions), long.index(positions)
    assert (a[:20_000] == b[:20_000]).all()
    assert b[:20_000].max() < 100 <= b[20_000:].max() < 400
    counts = np.bincount(b[20_000:], minlength=400)
    chi = ((counts - 50) ** 2 / 50).sum()  # 399 degrees of freedom: mean 399, deviation 28.2
    assert 399 - 5 * 28.2 < chi < 399 + 5 * 28.2
    assert (long.size_at(np.array([0, 19_999, 20_000])) == [100, 100, 400]).all()


def test_what_a_person_gets_wrong() -> None:
    with pytest.raises(UserError, match="windowed"):
        Order(10, 0, "shuffled")
    with pytest.raises(UserError, match="no samples"):
        Order(0, 0)
    with pytest.raises(UserError, match="empty at position 5"):
        PoolOrder(0, [(10, 3)]).index(np.array([12, 5]))
    with pytest.raises(ValueError, match="must not fall"):
        PoolOrder(0, [(10, 3)]).grow(9, 5)


def test_stored_order_is_the_identity() -> None:
    assert StoredOrder(4).index(np.array([0, 3, 5])).tolist() == [0, 3, 1]


def test_the_newest_samples_may_weigh_more() -> None:
    """Frequencies against the weights' shares, before and after each growth; bits are fixed."""
    plain = PoolOrder(7, [(0, 100), (10_000, 150)])
    assert np.array_equal(
        plain.index(np.arange(20_000)),
        PoolOrder(7, [(0, 60), (0, 100), (10_000, 150)]).index(np.arange(20_000)),
    )
    order = PoolOrder(7, [(0, 100), (10_000, 120), (10_000, 150)], newest_weight=3.0)
    early, late = order.index(np.arange(10_000)), order.index(np.arange(10_000, 50_000))
    counts = np.bincount(early, minlength=100)
    assert len(counts) == 100 and ((counts - 100) ** 2 / 100).sum() < 150  # chi-square, 99 degrees
    counts = np.bincount(late, minlength=150)
    expected = 40_000 * np.where(np.arange(150) < 100, 1.0, 3.0) / (100 + 3 * 50)
    assert len(counts) == 150 and ((counts - expected) ** 2 / expected).sum() < 210  # 149 degrees
    again = [order.index(np.arange(a, b)) for a, b in ((9_000, 20_000), (20_000, 50_000))]
    assert np.array_equal(np.concatenate(again), np.concatenate((early[9_000:], late)))
