"""Extraction: each picture read once, resumption, blocks of one size, independence of all that."""

import numpy as np
import pytest
import torch

from etude.core.errors import UserError
from etude.evaluation.extract import extract_set, feature_key
from etude.evaluation.sets import ArrayPictures, Pictures, Stages
from etude.metrics.extractors import Extractor
from etude.metrics.store import FeatureStore

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 1), dtype=np.uint8)


class Counted:
    """Fifty pictures that count how often each is read, and may fail on the way."""

    name, fingerprint, classes, protocol = "counted", "c", [], {}

    def __init__(self, fail_at: int = -1) -> None:
        self.read_count, self.fail_at = np.zeros(50, int), fail_at

    def __len__(self) -> int:
        return 50

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        if start <= self.fail_at < stop:
            raise KeyboardInterrupt
        self.read_count[start:stop] += 1
        keys = [f"{i}" for i in range(start, stop)]
        return Pictures(IMAGES[start:stop], keys, np.arange(start, stop), [""] * len(keys))


class Watched(Extractor):
    """Pixels that note the size of every block."""

    def __init__(self, name: str) -> None:
        super().__init__("pixels", input_size=6)
        self.name, self.dims, self.blocks = name, {name: 36}, []

    def infer(self, prepared: torch.Tensor) -> dict[str, torch.Tensor]:
        self.blocks.append(len(prepared))
        return {self.name: super().infer(prepared)["pixels"]}


def test_two_extractors_read_each_picture_once(tmp_path) -> None:
    store, pictures, pair = FeatureStore(tmp_path), Counted(), [Watched("a"), Watched("b")]
    rates = extract_set(pictures, pair, store, batch_size=8, shard_size=20)
    assert pictures.read_count.tolist() == [1] * 50
    assert set(rates) == {"resize", "forward", "statistics", "all"}
    for extractor in pair:
        assert set(extractor.blocks) == {8}
        found = store.load(feature_key(pictures, extractor))
        np.testing.assert_allclose(found.features, IMAGES.reshape(50, -1) / 255.0, rtol=1e-6)
        assert found.keys == [str(i) for i in range(50)] and found.labels.tolist() == [*range(50)]
    assert extract_set(pictures, pair, store, batch_size=8, shard_size=20) == {}
    assert pictures.read_count.max() == 1


def test_a_stopped_extraction_goes_on_where_it_was(tmp_path) -> None:
    store, extractor = FeatureStore(tmp_path), Watched("a")
    with pytest.raises(KeyboardInterrupt):
        extract_set(Counted(fail_at=33), [extractor], store, batch_size=8, shard_size=10)
    again = Counted()
    extract_set(again, [extractor], store, batch_size=8, shard_size=10)
    assert again.read_count.tolist() == [0] * 30 + [1] * 20
    found = store.load(feature_key(again, extractor)).features
    np.testing.assert_allclose(found, IMAGES.reshape(50, -1) / 255.0, rtol=1e-6)


def test_a_second_extractor_reads_only_for_itself(tmp_path) -> None:
    store, first, second = FeatureStore(tmp_path), Watched("a"), Watched("b")
    extract_set(Counted(), [first], store, shard_size=20)
    calls = len(first.blocks)
    extract_set(Counted(), [first, second], store, shard_size=20)
    assert len(first.blocks) == calls and len(second.blocks) == 3


def test_a_key_that_is_there_twice_is_refused_before_any_forward(tmp_path) -> None:
    extractor, keys = Watched("a"), [f"{i}" for i in range(49)] + ["7"]
    with pytest.raises(UserError, match="picture 7 is in the set twice"):
        extract_set(ArrayPictures(IMAGES, keys), [extractor], FeatureStore(tmp_path))
    assert extractor.blocks == [] and not list(tmp_path.iterdir())
