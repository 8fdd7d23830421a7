"""Batches are functions of positions: for any world size, decoder, resume and bad picture."""

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.data import decode_dali
from etude.data.augment import AugmentConfig
from etude.data.loader import Batch, DataConfig, Loader, choose_decoder, substitute
from etude.data.order import PoolOrder, StoredOrder
from etude.data.shards import ShardSet, write_shards
from etude.data.still import still_loader

DECODERS = ["torch"] + ["dali"] * (not decode_dali.why_missing())
COUNT = 60
ROTTEN = {7: b"", 21: b"not a picture", 40: None}  # None: a JPEG cut in half


def _jpeg(number: int) -> bytes:
    rng = np.random.default_rng(number)
    height, width = (int(n) for n in rng.integers(70, 100, 2))
    small = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write(folder: Path, rotten: dict) -> Path:
    def samples():
        for number in range(COUNT):
            data = _jpeg(number)
            if number in rotten:
                data = data[: len(data) // 2] if rotten[number] is None else rotten[number]
            yield {
                "key": f"{number:03d}",
                "image": data,
                "extension": "jpg",
                "label": number % 4,
                "caption": f"number {number}",
            }

    write_shards(folder, samples(), per_shard=16)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("good") / "set", {})


@pytest.fixture(scope="module")
def rotten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("rotten") / "set", ROTTEN)


def _loader(folder: Path, decoder: str = "torch", seed: int = 3, **options) -> Loader:
    augment = AugmentConfig(image_size=24, crop="random", flip=True)
    config = DataConfig(shards=str(folder), augment=augment, decoder=decoder, workers=2, **options)
    return Loader(config.open(), config, seed=seed)


def _facts(batch: Batch) -> list:
    control = torch.stack([batch.control[name] for name in sorted(batch.control)], dim=1)
    return list(
        zip(
            batch.positions,
            batch.keys,
            batch.labels.tolist(),
            batch.captions,
            control.tolist(),
            strict=True,
        )
    )


def _joined(loader: Loader, world: int, micro: int, steps: int, start: int = 0) -> list:
    """All samples of some steps in position order, as `world` processes see them."""
    facts = []
    for rank in range(world):
        stream = loader.batches(start, 16, micro, rank, world)
        for _ in range(steps * 16 // (micro * world)):
            facts += _facts(next(stream))
        stream.close()
    return sorted(facts, key=lambda fact: fact[0])


@pytest.mark.parametrize("order", ["global", "windowed(shards=2)"])
def test_world_size_micro_batch_decoder_and_resume_change_nothing(rotten: Path, order: str) -> None:
    options = {"order": order, "max_bad_rate": 0.1}
    reference = _joined(_loader(rotten, **options), 1, 16, 10)
    assert [fact[0] for fact in reference] == list(range(160))
    for decoder in DECODERS:
        for world, micro in ((1, 4), (2, 8), (2, 4), (4, 4), (4, 2)):
            loader = _loader(rotten, decoder, **options)
            assert _joined(loader, world, micro, 10) == reference, (decoder, world, micro)
            loader.close()
    resumed = _joined(_loader(rotten, **options), 2, 8, 4, start=96)
    assert resumed == reference[96:]


def test_a_pass_shows_every_picture_and_what_belongs_to_it(good: Path) -> None:
    loader, data = _loader(good), ShardSet(good)
    batch = loader.fetch(np.arange(COUNT, 2 * COUNT))
    assert sorted(batch.keys) == [f"{n:03d}" for n in range(COUNT)]
    for row, key in enumerate(batch.keys):
        size = Image.open(io.BytesIO(data[int(key)].data)).size
        assert (batch.control["width"][row], batch.control["height"][row]) == size
        assert batch.labels[row] == int(key) % 4 and batch.captions[row] == f"number {int(key)}"
    assert batch.images.shape == (COUNT, 3, 24, 24) and batch.images.abs().max() <= 1


def test_pixels_do_not_depend_on_the_batch(good: Path) -> None:
    loader = _loader(good)
    whole = loader.fetch(np.arange(48))
    rows = np.array([40, 3, 17])
    assert torch.equal(loader.fetch(rows).images, whole.images[rows])


@pytest.mark.parametrize("decoder", DECODERS)
def test_bad_pictures_are_replaced_counted_and_named(rotten: Path, good: Path, decoder) -> None:
    loader = _loader(rotten, decoder, max_bad_rate=0.1)
    clean = _loader(good)
    one = [fact for fact in _facts(loader.fetch(np.arange(COUNT)))]
    other = [fact for fact in _facts(clean.fetch(np.arange(COUNT)))]
    changed = [a[0] for a, b in zip(one, other, strict=True) if a != b]
    assert len(changed) == 3 and len({a[1] for a in one} & {"007", "021", "040"}) == 0
    for position in changed:
        index = int(clean.order.index(np.array([position]))[0])
        assert index in ROTTEN
        attempt = 0
        while index in ROTTEN:
            index = substitute(3, int(position), attempt, COUNT)
            attempt += 1
        assert one[position][1] == f"{index:03d}"
    reasons = dict(loader.bad)
    assert reasons.keys() == {"007", "021", "040"}
    assert "empty" in reasons["007"] and "truncated" in reasons["040"]
    fresh = _loader(rotten, decoder, max_bad_rate=0.1)
    alone = [_facts(fresh.fetch(np.array([position])))[0] for position in changed[::-1]]
    assert alone[::-1] == [one[position] for position in changed]


def test_too_many_bad_pictures_are_fatal(rotten: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 60 samples .* max_bad_rate=0\.02 .*raise data"):
        _loader(rotten, max_bad_rate=0.02).fetch(np.arange(COUNT))


def test_bytes_that_changed_after_indexing_are_bad(good: Path, tmp_path: Path) -> None:
    folder = _write(tmp_path / "set", {})
    path = folder / "000001.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xda")
    data[start + 40] ^= 4
    path.write_bytes(bytes(data))
    loader = _loader(folder, max_bad_rate=0.1)
    loader.fetch(np.arange(COUNT))
    assert len(loader.bad) == 1 and "not those that were indexed" in loader.bad[0][1]
    with pytest.raises(UserError, match="sha256"):
        _loader(folder, verify=True)


def test_errors_in_the_thread_reach_the_loop_and_threads_end(rotten: Path) -> None:
    before = threading.active_count()
    loader = _loader(rotten, max_bad_rate=0.0)
    with pytest.raises(UserError, match="unreadable"):
        for batch in loader.batches(0, 8, 8):
            assert batch.positions[0] < COUNT
    stream = _loader(rotten, max_bad_rate=1.0).batches(0, 8, 8)
    next(stream)
    stream.close()
    names = [thread.name for thread in threading.enumerate()]
    assert "etude-data" not in names and threading.active_count() <= before + 4


def test_the_wait_is_measured(good: Path) -> None:
    loader = _loader(good)
    fetch = loader.fetch

    def slow(positions: np.ndarray) -> Batch:
        time.sleep(0.05)
        return fetch(positions)

    loader.fetch = slow
    stream = loader.batches(0, 8, 8)
    waits = [next(stream).wait_seconds for _ in range(5)]
    stream.close()
    assert sum(waits) > 0.15 and loader.wait_share > 0.5


def test_uneven_batches_are_refused_at_once(good: Path) -> None:
    with pytest.raises(UserError, match="multiple of 24"):
        _loader(good).batches(0, 16, 8, 0, 3)


def test_the_decoder_is_chosen_for_a_stated_reason(good: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "PNG")
    write_shards(small, [{"key": "a", "image": buffer.getvalue(), "extension": "png"}])
    wanted = "dali" if len(DECODERS) == 2 else "torch"
    gpu = torch.device("cuda")
    name, reason = choose_decoder(ShardSet(small), _loader(small, "auto").config, gpu)
    assert name == "torch" and ("not JPEGs" in reason or len(DECODERS) == 1)
    name, reason = choose_decoder(ShardSet(good), _loader(good, "auto").config, gpu)
    assert name == wanted and ("32 of 32" in reason or len(DECODERS) == 1)
    auto = _loader(good, "auto")
    assert auto.decoder.name == "torch" and "DALI" in auto.decoder_reason
    assert _loader(small, "dali_if_installed").decoder.name == wanted


def test_other_orders(good: Path) -> None:
    data, config = ShardSet(good), _loader(good).config
    pool = Loader(data, config, seed=1, order=PoolOrder(9, [(0, 5), (100, COUNT)]))
    early, late = pool.fetch(np.arange(100)).keys, pool.fetch(np.arange(100, 400)).keys
    assert set(early) == {f"{n:03d}" for n in range(5)} and len(set(late)) > 50
    stored = Loader(data, config, seed=1, order=StoredOrder(COUNT)).fetch(np.arange(3))
    assert stored.keys == ["000", "001", "002"]
    still = still_loader(data, config).fetch(np.array([59, 0]))
    assert still.keys == ["059", "000"] and still.control["flip"].sum() == 0
    side = torch.minimum(still.control["height"], still.control["width"])
    assert torch.equal(still.control["crop_height"], side)


def test_substitutes_differ_by_attempt_and_are_even() -> None:
    drawn = np.array([[substitute(3, p, attempt, 5) for attempt in range(4)] for p in range(400)])
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.2
    # 1,600 draws over 5 samples: 320 each with deviation 16; five deviations.
    assert abs(np.bincount(drawn.ravel(), minlength=5) - 320).max() < 80
