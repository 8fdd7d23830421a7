"""A pool only grows, keeps every pixel, and a part exists wholly or not at all."""

import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from etude.core.errors import UserError
from etude.core.files import read_json
from etude.data.pool import Pool
from etude.data.pool_parts import (
    PartKey,
    encode_png,
    link_part,
    part_images,
    picture_digest,
    write_part,
)
from etude.data.shards import ShardSet


def _labels(number: int, count: int = 7) -> np.ndarray:
    return np.random.default_rng(1000 + number).integers(0, 10, count)


def _round(pool: Pool, number: int, count: int = 7, visible_from: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(number)
    images = rng.integers(0, 256, (count, 6, 6, 1), dtype=np.uint8)
    pool.append(
        images,
        _labels(number, count),
        seed_indices=np.arange(count) + 100 * number,
        entropies=np.where(np.arange(count) % 2, np.nan, rng.random(count)),
        visible_from=1000 * number if visible_from is None else visible_from,
        guidance={"scale": 0.5 * number},
        generator="g",
        learner=f"l{number}",
        per_shard=4,
    )
    return images


def test_rounds_come_back_exactly(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    images = np.concatenate([_round(pool, number) for number in range(3)])
    labels = np.concatenate([_labels(number) for number in range(3)])
    for opened in (pool, Pool(tmp_path / "pool"), Pool(tmp_path / "pool", cache_bytes=0)):
        assert len(opened) == 21
        indices = np.random.default_rng(0).integers(0, 21, 50)
        assert np.array_equal(opened.images(indices), images[indices])
        assert np.array_equal(opened.labels(indices), labels[indices])
        assert opened.seed_indices([0, 8, 20]).tolist() == [0, 101, 206]
        assert np.isnan(opened.entropies([1, 3])).all() and (opened.entropies([0, 2]) > 0).all()
        assert [opened.size_at(p) for p in (0, 999, 1000, 1999, 2000, 10**9)] == [
            7,
            7,
            14,
            14,
            21,
            21,
        ]
        assert opened.parts[2].guidance == {"scale": 1.0} and opened.parts[2].first == 14
        assert opened.ends == [7, 14, 21] and opened.rounds_of([6, 7, 20]).tolist() == [0, 1, 2]
        hashes = [picture_digest(image) for image in images[[3, 9]]]
        assert np.array_equal(opened.digests([3, 9]), hashes) and (hashes[0] != hashes[1]).any()
    stored = ShardSet(tmp_path / "pool" / pool.parts[1].folder, verify=True)
    assert stored.labels.tolist() == pool.labels(range(7, 14)).tolist()
    with pytest.raises(IndexError):
        pool.images([21])


def test_growth_leaves_earlier_draws_alone(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    _round(pool, 0)
    early = pool.order(4).index(np.arange(1000))
    _round(pool, 1)
    assert np.array_equal(pool.order(4).index(np.arange(1000)), early)
    assert pool.order(4).index(np.arange(1000, 1200)).max() >= 7


@pytest.mark.parametrize("step", range(12))
def test_a_crash_at_any_step_leaves_the_old_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    pool = Pool(tmp_path / "pool")
    first = _round(pool, 0)
    calls = 0
    real = {name: getattr(os, name) for name in ("replace", "fsync", "rename")}

    def crashing(name):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls > step * 2:
                raise KeyboardInterrupt
            return real[name](*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, crashing(name))
        try:
            _round(pool, 1)
            published = True
        except KeyboardInterrupt:
            published = False
    found = Pool(tmp_path / "pool")
    assert len(found) in ((14,) if published else (7, 14))
    assert np.array_equal(found.images(range(7)), first)
    if len(found) == 7:
        second = _round(found, 1)
        assert np.array_equal(Pool(tmp_path / "pool").images(range(7, 14)), second)


def test_what_was_written_and_not_published_is_ignored_and_used_again(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    _round(pool, 0)
    saved = (tmp_path / "pool" / "manifest.jsonl").read_bytes()
    _round(pool, 1)
    whole = tmp_path / "pool" / pool.parts[1].folder
    (tmp_path / "pool" / "manifest.jsonl").write_bytes(saved)
    half = shutil.copytree(whole, whole.with_name(f".{whole.name}.0a1b2c3d"))
    (half / "000000.tar").unlink()
    pool, written = Pool(tmp_path / "pool"), whole.stat().st_ino
    assert len(pool) == 7
    images = _round(pool, 1)
    assert np.array_equal(Pool(tmp_path / "pool").images(range(7, 14)), images)
    assert whole.stat().st_ino == written


def test_rewind_withdraws_later_rounds(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    for number in range(3):
        _round(pool, number)
    line = (tmp_path / "pool" / "manifest.jsonl").read_text().splitlines()[2]
    assert pool.rewind(1500) == 1 and len(pool) == 14 and pool.rewind(1500) == 0
    _round(pool, 2)
    assert (tmp_path / "pool" / "manifest.jsonl").read_text().splitlines()[2] == line


def test_damage_is_named(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    _round(pool, 0)
    _round(pool, 1)
    manifest = tmp_path / "pool" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    changed = json.loads(lines[1]) | {"visible_from": 999}
    for text in (
        lines[1],
        lines[0] + "\n" + json.dumps(changed),
        "{",
        "[]",
        "\n".join(lines[::-1]),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=r"manifest\.jsonl, line"):
            Pool(tmp_path / "pool")
    manifest.write_text("\n".join(lines))
    lost = pool.parts[0].folder
    shutil.rmtree(tmp_path / "pool" / lost)
    with pytest.raises(UserError, match=lost):
        Pool(tmp_path / "pool")


def test_rounds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool")
    _round(pool, 1)
    with pytest.raises(ValueError, match="comes before the one it follows"):
        _round(pool, 2, visible_from=10)
    with pytest.raises(UserError, match="empty at position"):
        pool.order(0).index(np.array([10]))
    assert encode_png(np.zeros((3, 3), np.uint8))[:4] == b"\x89PNG"


def _key(first: int, count: int, **changes) -> PartKey:
    fields = {"seed": 1, "guidance": None, "generator": "g", "learner": "", "extra": {"x": 1}}
    return PartKey(first, count, **fields | changes)


def _write(folder: Path, key: PartKey, value: int) -> np.ndarray:
    images = np.full((key.count, 4, 4, 3), value, np.uint8)
    labels, nan = np.arange(key.count), np.full(key.count, np.nan)
    write_part(folder, key, images, labels, seed_indices=labels, entropies=nan, cost={"seconds": 2})
    return images


def test_parts_of_several_writers_are_published_at_once_and_in_order(tmp_path: Path) -> None:
    keys = [_key(0, 3), _key(3, 2), _key(5, 4)]
    pool, reader = Pool(tmp_path), Pool(tmp_path)
    for place in (2, 0, 1):
        _write(tmp_path, keys[place], 10 * place)
    assert len(Pool(tmp_path)) == 0
    pool.publish(keys, round_number=0, visible_from=0)
    reader.refresh()
    for opened in (pool, reader, Pool(tmp_path)):
        assert [part.first for part in opened.parts] == [0, 3, 5] and opened.ends == [9]
        assert opened.images(range(9))[:, 0, 0, 0].tolist() == [0] * 3 + [10] * 2 + [20] * 4
        assert opened.cost() == {"seconds": 6.0} and opened.cost(5) == {"seconds": 4.0}
    with pytest.raises(ValueError, match="does not begin at 9"):
        pool.publish([_key(8, 1)], round_number=1, visible_from=5)
    assert pool.rewind(-1) == 3
    reader.refresh()
    assert len(pool) == len(reader) == 0 and len(list(tmp_path.glob("part-*"))) == 3


def test_a_part_is_named_after_all_that_fixes_it(tmp_path: Path) -> None:
    """Whoever writes an equal part second gives way; any other part is another folder."""
    key = _key(0, 3)
    first = _write(tmp_path, key, 1)
    _write(tmp_path, key, 2)
    assert np.array_equal(part_images(tmp_path / key.folder), first)
    changes = [{"seed": 2}, {"guidance": {"omega": 0.1}}, {"generator": "h"}, {"learner": "l"}]
    others = [_key(0, 3, **change) for change in [*changes, {"extra": {"x": 2}}]] + [_key(0, 4)]
    assert len({key.folder, *(other.folder for other in others)}) == 7


def test_a_linked_part_is_the_same_files(tmp_path: Path) -> None:
    key = _key(0, 3)
    images = _write(tmp_path / "one", key, 7)
    link_part(tmp_path / "one" / key.folder, tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    pool = Pool(tmp_path / "two")
    pool.publish([key], round_number=0, visible_from=0)
    assert np.array_equal(pool.images(range(3)), images)
    assert read_json(tmp_path / "two" / key.folder / "cost.json") == {"seconds": 2}


def test_damaged_columns_are_named(tmp_path: Path) -> None:
    _write(tmp_path, _key(0, 3), 1)
    Pool(tmp_path).publish([_key(0, 3)], round_number=0, visible_from=0)
    columns = tmp_path / _key(0, 3).folder / "columns.npz"
    columns.write_bytes(columns.read_bytes()[:-30])
    with pytest.raises(UserError, match="columns.npz is missing or damaged"):
        Pool(tmp_path)


def test_a_pool_of_many_parts_holds_few_files_open(tmp_path: Path) -> None:
    for number in range(150):
        _write(tmp_path, _key(2 * number, 2), number)
    keys = [_key(2 * number, 2) for number in range(150)]
    Pool(tmp_path).publish(keys, round_number=0, visible_from=0)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    pool = Pool(tmp_path, cache_bytes=0)
    pool.images(np.arange(300))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 64 + 10
    assert pool.images(np.arange(300))[:, 0, 0, 0].tolist() == [n for n in range(150) for _ in "ab"]
