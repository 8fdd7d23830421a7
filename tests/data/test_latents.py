"""The latent cache holds what the encoder gave, resumes, and refuses what is not its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.core.rng import Stream, integers, normal
from etude.data.augment import AugmentConfig
from etude.data.latents import LatentLoader, encode_latents, latents_plan, weights_key
from etude.data.loader import DataConfig, Loader
from etude.data.order import Order
from etude.data.pool_parts import encode_png
from etude.data.shards import ShardSet, write_shards

COUNT, BAD = 30, 11
OPTIONS = {"variants": 3, "scaling_factor": 0.5, "shift_factor": 0.25}


def _encoder(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., ::2, ::2] * 3 + 1, images[:, :, 1::2, 1::2].abs() + 0.5


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    def samples():
        for number in range(COUNT):
            pixels = np.random.default_rng(number).integers(0, 256, (14, 12, 3), dtype=np.uint8)
            image = b"" if number == BAD else encode_png(pixels)
            sample = {"key": f"{number:03d}", "image": image, "extension": "png", "label": number}
            yield sample | {"meta": {"score": number / 7, "flip": 5}}

    write_shards(tmp_path / "set", samples(), per_shard=8)
    augment = AugmentConfig(image_size=8, crop="random", flip=True)
    return DataConfig(shards=str(tmp_path / "set"), augment=augment, max_bad_rate=0.1)


def _loader(config: DataConfig, folder: Path) -> LatentLoader:
    encode_latents(config.open(), config, _encoder, folder, "weights", 5, **OPTIONS)
    return LatentLoader(
        folder, seed=9, plan=latents_plan(config.open(), config, "weights", 5, **OPTIONS)
    )


def test_a_latent_is_the_encoders_of_the_same_crop(config: DataConfig, tmp_path: Path) -> None:
    loader = _loader(config, tmp_path / "cache")
    positions = np.arange(COUNT, 4 * COUNT)
    batch = loader.fetch(positions)
    indices = Order(COUNT, 9).index(positions)
    variants = integers(9, Stream.VARIANT, positions, 3)
    assert set(variants.tolist()) == {0, 1, 2}
    noise = normal(9, Stream.POSTERIOR, positions, (3, 4, 4))

    class Places:  # the pictures' own loader at the places that variants were cut at
        def index(self, places: np.ndarray) -> np.ndarray:
            return places // 3

        def size_at(self, places: np.ndarray) -> np.ndarray:
            return np.full(len(places), COUNT)

    pictures = Loader(ShardSet(config.shards), config, seed=5, order=Places())
    for row in np.flatnonzero(indices != BAD):
        place = np.array([indices[row] * 3 + variants[row]], dtype=np.int64)
        picture = pictures.fetch(place)
        mean, std = _encoder(picture.images)
        expected = (mean + std * noise[row] - 0.25) * 0.5
        assert (batch.latents[row] - expected[0]).abs().max() < 1e-6
        assert batch.keys[row] == picture.keys[0] and batch.labels[row] == indices[row]
        assert picture.control["score"][0] == np.float32(indices[row] / 7)
        for name, values in picture.control.items():
            assert batch.control[name][row] == values[0], name
    assert [key for key, _ in loader.bad] == [f"{BAD:03d}"]
    assert f"{BAD:03d}" not in batch.keys and len(set(batch.keys)) == COUNT - 1


def test_positions_alone_decide(config: DataConfig, tmp_path: Path) -> None:
    loader = _loader(config, tmp_path / "cache")
    whole = loader.fetch(np.arange(64))
    stream = loader.batches(32, 16, 4, 1, 2)
    for first in (36, 44, 52, 60):
        batch = next(stream)
        rows = slice(first, first + 4)
        assert batch.keys == whole.keys[rows] and torch.equal(batch.latents, whole.latents[rows])
    stream.close()


def test_another_key_is_refused_by_name(config: DataConfig, tmp_path: Path) -> None:
    data, folder = config.open(), tmp_path / "cache"
    own = _loader(config, folder).plan["key"][:12]
    other = latents_plan(data, config, "others", 5, **OPTIONS)
    reason = f"key {own} but this run needs {other['key'][:12]} .autoencoder weights instead of o"
    with pytest.raises(UserError, match=reason):
        LatentLoader(folder, seed=9, plan=other)
    with pytest.raises(UserError, match="autoencoder weights instead of others"):
        encode_latents(data, config, _encoder, folder, "others", 5, **OPTIONS)
    changed = config.model_copy(update={"augment": AugmentConfig(image_size=8)})
    keys = {
        latents_plan(data, c, "weights", s, **(OPTIONS | o))["key"]
        for c, s, o in (
            (config, 5, {}),
            (changed, 5, {}),
            (config, 6, {}),
            (config, 5, {"variants": 2}),
            (config, 5, {"dtype": torch.float16}),
            (config, 5, {"scaling_factor": 0.6}),
        )
    }
    assert len(keys) == 6


def test_an_interrupted_cache_goes_on(config: DataConfig, tmp_path: Path) -> None:
    said: list[str] = []

    class Log:
        info = staticmethod(said.append)

    calls = 0

    def dies(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise KeyboardInterrupt
        return _encoder(images)

    data, folder = config.open(), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        encode_latents(data, config, dies, folder, "weights", 5, Log, **OPTIONS)
    assert len(list(folder.glob("*.safetensors"))) == 2 and "GB" in said[0]
    with pytest.raises(UserError, match="no complete latents"):
        LatentLoader(folder, seed=9)
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    encode_latents(data, config, _encoder, folder, "weights", 5, **OPTIONS)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    ranks = tmp_path / "ranks"
    for rank in (1, 0):
        encode_latents(data, config, _encoder, ranks, "weights", 5, rank=rank, world=2, **OPTIONS)
    _loader(config, tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
        assert path.read_bytes() == (ranks / path.name).read_bytes()


def test_damaged_caches_are_refused(config: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    _loader(config, folder)
    pristine = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for case in range(120):
        rng = np.random.default_rng(case)
        path = list(pristine)[case % len(pristine)]
        data = bytearray(pristine[path])
        if case % 3:
            data[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
        else:
            data = data[: rng.integers(0, len(data))]
        path.write_bytes(bytes(data))
        with pytest.raises(UserError):
            LatentLoader(folder, seed=9, verify=True)
        path.write_bytes(pristine[path])
    assert json.loads((folder / "cache.json").read_text())["plan"]["autoencoder"] == "weights"


def test_weights_key_follows_every_weight() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    before = weights_key(module)
    assert weights_key(module) == before
    with torch.no_grad():
        module[0].weight[1, 2] += 1
    assert weights_key(module) != before
