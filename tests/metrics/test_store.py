"""The store: addresses, resumption by shard, exact counts, damage, two writers at once."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.metrics import store as store_module
from etude.metrics.store import FeatureKey, FeatureStore

KEY = FeatureKey("pictures", "test", "1", "abc", "none", "float32", 10)
ROWS = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 3))).float()


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(
    store: FeatureStore, key: FeatureKey = KEY, only: int | None = None, size: int = 4, **other
) -> None:
    writer = store.writer(key, shard_size=size)
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


def test_of_two_writers_that_round_otherwise_the_first_stays(tmp_path, monkeypatch) -> None:
    """The second began when the shard was not there; a manifest may name the first by now."""
    first, second = (FeatureStore(tmp_path).writer(KEY, 10) for _ in "ab")
    of_first = [f"k{i}" for i in range(10)], torch.arange(10), ["g"] * 10

    def has(self, start: int, stop: int) -> bool:
        monkeypatch.undo()
        first.write(0, ROWS, *of_first)
        return False

    monkeypatch.setattr(type(second), "has", has)
    second.write(0, ROWS + 1e-6, *of_first)
    first.finish()
    assert torch.equal(FeatureStore(tmp_path).load(KEY).features, ROWS)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("adopts", [False, True])
def test_a_shard_that_another_mended_meanwhile_stays(tmp_path, monkeypatch, adopts: bool) -> None:
    """The second sees the damage; the first mends it and finishes the entry; then the second goes
    on.
    """
    store, other = FeatureStore(tmp_path / "store"), FeatureStore(tmp_path / "other")
    first, second, apart = (one.writer(KEY, 10) for one in (store, store, other))
    rest = [f"k{i}" for i in range(10)], torch.arange(10), ["g"] * 10
    first.write(0, ROWS, *rest)
    apart.write(0, ROWS + 1e-6, *rest)
    (shard,), (theirs,) = ((tmp_path / name).rglob("0*.safetensors") for name in ("store", "other"))
    shard.write_bytes(shard.read_bytes()[:-4])
    looked = store_module._is_whole

    def is_whole(path, count=None) -> bool:
        found = looked(path, count)
        if path == shard:
            monkeypatch.undo()
            first.write(0, ROWS, *rest)
            first.finish()
        return found

    monkeypatch.setattr(store_module, "_is_whole", is_whole)
    if adopts:
        second.adopt(theirs)
    else:
        second.write(0, ROWS + 1e-6, *rest)
    assert torch.equal(store.load(KEY).features, ROWS)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_whole_shard_of_another_length_is_made_again(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    fill(store)
    long, short = (next(tmp_path.rglob(f"{start:09d}-4.*")) for start in (0, 8))
    long.write_bytes(short.read_bytes())
    assert store.writer(KEY, 4).missing() == [(0, 4)]
    fill(store)
    assert torch.equal(store.load(KEY).features, ROWS)


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


def test_moments_of_a_group_are_those_of_its_rows(tmp_path) -> None:
    store, writer = FeatureStore(tmp_path), FeatureStore(tmp_path).writer(KEY, 4)
    groups = ["a", "b", "a/..", "a", "b", "b", "a", "a", "b", "a"]
    for start, stop in writer.missing():
        keys = [f"k{i}" for i in range(start, stop)]
        writer.write(start, ROWS[start:stop], keys, torch.zeros(stop - start), groups[start:stop])
    writer.finish()
    for group in ("a", "b", None, "a"):  # the last from the file that the first wrote
        rows = ROWS.double()[[group in (None, one) for one in groups]].numpy()
        found = store.moments(KEY, group)
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(found.covariance(), np.cov(rows.T), atol=1e-12)
    with pytest.raises(UserError, match="has no group 'c'"):
        store.moments(KEY, "c")
    (kept,) = {p for p in tmp_path.rglob("moments-*") if "all" in p.name}
    kept.write_bytes(kept.read_bytes()[:-8])  # damaged: computed again
    np.testing.assert_allclose(store.moments(KEY).mean, ROWS.double().mean(0), atol=1e-12)


def grouped(store: FeatureStore) -> list[str]:
    """An entry of ten rows whose groups' sizes are 7, 2 and 1; its groups."""
    groups, writer = list("aabaaacaba"), store.writer(KEY, 4)
    for start, stop in writer.missing():
        keys = [f"k{i}" for i in range(start, stop)]
        rows, labels = ROWS[start:stop], torch.zeros(stop - start)
        writer.write(start, rows, keys, labels, groups[start:stop])
    writer.finish()
    return groups


@pytest.mark.parametrize("block", [1, 3, 8192])
def test_all_groups_are_made_in_one_pass(tmp_path, monkeypatch, block: int) -> None:
    store, read = FeatureStore(tmp_path), []
    groups = grouped(store)
    once = store_module._read_shard
    monkeypatch.setattr(store_module, "_read_shard", lambda path: read.append(path) or once(path))
    monkeypatch.setattr(store_module, "_BLOCK", block)
    found = store.moments_of(KEY, iter(["c", "a", None, "b"]))
    assert list(found) == ["c", "a", None, "b"] and len(read) == 3
    for group, moments in found.items():
        rows = ROWS.double()[[group in (None, one) for one in groups]].numpy()
        assert moments.count == len(rows)
        np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-12)
        scatter = (rows - rows.mean(0)).T @ (rows - rows.mean(0))
        np.testing.assert_allclose(moments.scatter, scatter, atol=1e-12)
    assert len(list(tmp_path.rglob("moments-*"))) == 2  # of "a" and of all: the others are small
    store.moments_of(KEY, ["a", None])
    assert len(read) == 3
    with pytest.raises(UserError, match="has no group 'd'"):
        store.moments_of(KEY, ["a", "d"])


@pytest.mark.parametrize("damage", ["", "cut", "{}", "[]", '{"shards": []}', '{"shards": [1]}'])
def test_a_damaged_manifest_is_written_again_and_never_read(tmp_path, damage: str) -> None:
    store = FeatureStore(tmp_path)
    fill(store)
    manifest = next(tmp_path.rglob("manifest.json"))
    whole = manifest.read_text()
    manifest.write_text(whole[:200] if damage == "cut" else damage)
    assert not store.has(KEY)
    for read in (store.load, store.moments):
        with pytest.raises(UserError, match="has no complete entry .*; run the extract or"):
            read(KEY)
    fill(store)
    assert manifest.read_text() == whole and torch.equal(store.load(KEY).features, ROWS)


@pytest.mark.parametrize("key", [{"more": 1}, [], {"count": None}])
def test_a_store_of_other_keys_is_not_merged(tmp_path, key: dict | list) -> None:
    other = FeatureStore(tmp_path / "other")
    fill(other)
    path = next(tmp_path.rglob("key.json"))
    known = json.loads(path.read_text())
    if isinstance(key, dict):
        key = {name: value for name, value in (known | key).items() if value is not None}
    path.write_text(json.dumps(key))
    with pytest.raises(
        UserError, match=r"key.json is not a key of this version \((more|count|no f)"
    ):
        FeatureStore(tmp_path / "mine").merge(other)


def test_rows_are_chosen_by_number_and_not_by_a_mask(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    fill(store)
    found, mask = store.load(KEY), ROWS[:, 0] > 0
    with pytest.raises(UserError, match=r"got torch.bool; a mask's are mask.nonzero\(\)\[:, 0\]"):
        found.rows(mask)
    some = found.rows(mask.nonzero()[:, 0])
    assert torch.equal(some.features, ROWS[mask]) and len(some) == int(mask.sum())


def test_merging_mends_a_damaged_shard_and_keeps_a_whole_one(tmp_path) -> None:
    mine, other = FeatureStore(tmp_path / "mine"), FeatureStore(tmp_path / "other")
    fill(mine, only=0)
    fill(other)
    shard = next((tmp_path / "mine").rglob("000000000-4.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    assert mine.merge(other) == 1 and shard.read_bytes() == whole
    assert torch.equal(mine.load(KEY).features, ROWS)


def test_stores_filled_apart_merge_to_the_whole(tmp_path) -> None:
    first, second, whole = (FeatureStore(tmp_path / name) for name in ("a", "b", "c"))
    fill(whole)
    fill(first, only=0)
    for start in (4, 8):
        fill(second, only=start)
    assert first.merge(second) == 1 and first.has(KEY) and not second.has(KEY)
    names = sorted(path.name for path in (tmp_path / "c").rglob("*") if path.is_file())
    for name in names:  # byte for byte what one job would have written
        (one,), (other,) = (tmp_path / "a").rglob(name), (tmp_path / "c").rglob(name)
        assert one.read_bytes() == other.read_bytes()
    assert first.merge(second) == 0


def test_a_damaged_shard_is_not_merged(tmp_path) -> None:
    first, second = FeatureStore(tmp_path / "a"), FeatureStore(tmp_path / "b")
    fill(second, only=4)
    (shard,) = (tmp_path / "b").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="are damaged; extract them again"):
        first.merge(second)
    assert not list((tmp_path / "a").rglob("*.safetensors"))


@pytest.mark.parametrize(("mine", "theirs"), [(2, 5), (5, 2), (3, 4)])
def test_stores_of_other_shard_sizes_merge_to_a_complete_entry(tmp_path, mine, theirs) -> None:
    first, second = FeatureStore(tmp_path / "a"), FeatureStore(tmp_path / "b")
    fill(first, only=0, size=mine)
    fill(second, size=theirs)
    assert first.merge(second) == 1 and torch.equal(first.load(KEY).features, ROWS)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_no_store_is_not_merged(tmp_path, there: bool) -> None:
    if there:
        (tmp_path / "other" / "pictures").mkdir(parents=True)
    with pytest.raises(UserError, match=r"other holds no features; name a folder"):
        FeatureStore(tmp_path / "mine").merge(FeatureStore(tmp_path / "other"))


@pytest.mark.parametrize("back", [1, 40, 80, 100])
def test_moments_with_a_flipped_bit_are_computed_again(tmp_path, back: int) -> None:
    """Of scatter, of mean and of the count, wherever in the file they lie."""
    store = FeatureStore(tmp_path)
    fill(store)
    store.moments(KEY)
    (kept,) = tmp_path.rglob("moments-*")
    whole = kept.read_bytes()
    data = bytearray(whole)
    data[-back] ^= 64
    kept.write_bytes(data)
    found = store.moments(KEY)
    assert found.count == 10
    np.testing.assert_allclose(found.mean, ROWS.double().mean(0), atol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(ROWS.double().numpy().T), atol=1e-12)
    assert kept.read_bytes() == whole


def test_moments_are_given_where_they_cannot_be_kept(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    fill(store)
    with full_disk():
        found = store.moments(KEY)
    np.testing.assert_allclose(found.covariance(), np.cov(ROWS.double().numpy().T), atol=1e-12)
    assert not list(tmp_path.rglob("moments-*")) and not list(tmp_path.rglob("*.tmp"))


def test_what_keeps_a_store_from_being_written_is_said_in_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"feature store .*/file/store cannot be written to \(Not a"
    ):
        FeatureStore(tmp_path / "file" / "store").writer(KEY)
    full = pytest.raises(
        UserError, match=r"store .*/b cannot be written to \(File too large\); make"
    )
    store, other = FeatureStore(tmp_path / "b"), FeatureStore(tmp_path / "c")
    fill(other)
    with full_disk(), full:
        store.writer(KEY)
    writer = store.writer(KEY, 10)
    rest = [f"k{i}" for i in range(10)], torch.arange(10), ["g"] * 10
    with full_disk(), full:
        writer.write(0, ROWS, *rest)
    with full_disk(), full:
        store.merge(other)
    writer.write(0, ROWS, *rest)
    with full_disk(), full:
        writer.finish()
    assert not store.has(KEY) and not list((tmp_path / "b").rglob("*.tmp"))


def test_files_of_killed_writers_go_when_the_entry_is_finished(tmp_path) -> None:
    store = FeatureStore(tmp_path)
    fill(store, only=0)
    entry = next(tmp_path.rglob("key.json")).parent
    now = (entry / "key.json").stat().st_mtime
    for name, age in ((".old.tmp", 7 * 3600), (".young.tmp", 3600), ("old.txt", 7 * 3600)):
        (entry / name).write_bytes(b"part")
        os.utime(entry / name, (now - age, now - age))
    fill(store)
    left = {path.name for path in entry.iterdir() if path.suffix in (".tmp", ".txt")}
    assert left == {".young.tmp", "old.txt"}
