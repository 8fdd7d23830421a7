"""The store: addresses, resumption by shard, exact counts, damage, two writers at once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.metrics.store import FeatureKey, FeatureStore

KEY = FeatureKey("pictures", "test", "1", "abc", "none", "float32", 10)
ROWS = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 3))).float()


def fill(store: FeatureStore, key: FeatureKey = KEY, only: int | None = None, **other) -> None:
    writer = store.writer(key, shard_size=4)
    for start, stop in writer.missing():
        if only is None or start == only:
            keys = other.get("keys", [f"k{i}" for i in range(10)])[start:stop]
            writer.write(
                start, ROWS[start:stop], keys, torch.arange(start, stop), ["g"] * len(keys)
            )
    if only is None:
        writer.finish()


def test_what_is_written_is_read(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    assert not store.has(KEY)
    fill(store)
    found = store.load(KEY)
    assert store.has(KEY) and torch.equal(found.features, ROWS)
    assert found.keys == [f"k{i}" for i in range(10)] and found.groups == ["g"] * 10
    assert torch.equal(found.labels, torch.arange(10))
    assert torch.equal(store.load(KEY.digest()).features, ROWS)
    some = found.rows(torch.tensor([7, 2]))
    assert some.keys == ["k7", "k2"] and torch.equal(some.features, ROWS[[7, 2]])


def test_every_field_of_the_key_is_part_of_the_address() -> None:
    changes = [
        {"pictures": "other"},
        {"extractor": "other"},
        {"version": "2"},
        {"weights_sha256": "abd"},
        {"preprocessing": "resize"},
        {"dtype": "float16"},
        {"count": 9},
    ]
    addresses = {KEY.digest()} | {replace(KEY, **change).digest() for change in changes}
    assert len(addresses) == 8


def test_only_missing_shards_are_asked_for(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    fill(store, only=4)
    assert store.writer(KEY, 4).missing() == [(0, 4), (8, 10)]
    assert not store.has(KEY)
    with pytest.raises(UserError, match="no complete entry"):
        store.load(KEY)
    fill(store)
    assert torch.equal(store.load(KEY).features, ROWS)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_shard_is_made_again_and_never_read(tmp_path, damage: str) -> None:
    store = FeatureStore(tmp_path)
    fill(store)
    shard = next(tmp_path.rglob("000000004-4.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 8
    shard.write_bytes({"cut": data[:-5], "flip": data, "empty": b""}[damage])
    with pytest.raises(UserError, match="damaged"):
        store.load(KEY)
    assert store.writer(KEY, 4).missing() == [(4, 8)]
    fill(store)
    assert torch.equal(store.load(KEY).features, ROWS)


def test_a_duplicate_key_is_refused(tmp_path) -> None:
    keys = [f"k{i}" for i in range(9)] + ["k3"]
    store = FeatureStore(tmp_path)
    with pytest.raises(UserError, match="picture k3 is in the set twice"):
        fill(store, keys=keys)
    assert not store.has(KEY)


def test_a_shard_of_another_length_and_nan_are_refused(tmp_path) -> None:
    writer = FeatureStore(tmp_path).writer(KEY, 4)
    with pytest.raises(ValueError, match="rows"):
        writer.write(0, ROWS[:3], ["a", "b", "c"], torch.arange(3), ["", "", ""])
    bad = ROWS[:4].clone()
    bad[2, 1] = torch.nan
    with pytest.raises(UserError, match="picture c are not finite"):
        writer.write(0, bad, ["a", "b", "c", "d"], torch.arange(4), [""] * 4)


def test_two_writers_of_one_entry_agree(tmp_path) -> None:
    one, two = (FeatureStore(tmp_path).writer(KEY, 4) for _ in "ab")
    for start, stop in one.missing():
        for writer in (one, two):
            keys = [f"k{i}" for i in range(start, stop)]
            writer.write(
                start, ROWS[start:stop], keys, torch.arange(start, stop), ["g"] * len(keys)
            )
    one.finish()
    two.finish()
    assert torch.equal(FeatureStore(tmp_path).load(KEY).features, ROWS)
    assert not list(tmp_path.rglob("*.tmp"))
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    assert [shard["count"] for shard in manifest["shards"]] == [4, 4, 2]
