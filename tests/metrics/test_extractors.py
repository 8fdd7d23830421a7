"""Extractors: preprocessing against independent formulas, saved classifiers, Inception weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from etude.core.errors import UserError
from etude.metrics.extractors import (
    Extractor,
    load_extractor,
    resize_antialiased,
    to_channels,
)
from etude.metrics.extractors.classifier import ClassifierExtractor, save_classifier
from etude.metrics.extractors.inception import InceptionExtractor
from etude.metrics.extractors.pixels import PixelExtractor
from etude.models.classifier import Classifier, ClassifierConfig

INCEPTION = Path(os.environ.get("ETUDE_INCEPTION", "data/inception"))


def pictures(rows: int, side: int, channels: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (rows, side, side, channels), dtype=np.uint8))


@pytest.mark.parametrize("size", [16, 100])
def test_antialiased_resize_is_pillows(size: int) -> None:
    x = pictures(1, 41, 1)[0, :, :, 0].numpy().astype(np.float32)
    pillow = Image.fromarray(x, mode="F").resize((size, size), Image.Resampling.BILINEAR)
    found = resize_antialiased(torch.from_numpy(x)[None, None], size)[0, 0]
    np.testing.assert_allclose(found, np.asarray(pillow), atol=2e-3)


def test_grey_is_repeated_and_colour_becomes_luma() -> None:
    grey, colour = pictures(2, 4, 1), pictures(2, 4, 3)
    repeated = to_channels(grey, 3)
    assert repeated.shape == (2, 3, 4, 4) and torch.equal(repeated[:, 0], repeated[:, 2])
    luma = to_channels(colour, 1)[:, 0].numpy()
    expected = colour.numpy().astype(np.float64) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(luma, expected, atol=1e-3)


def test_pixels_are_themselves() -> None:
    x = pictures(3, 6, 1)
    found = PixelExtractor(6)(x)
    np.testing.assert_allclose(found, x.numpy().reshape(3, -1) / 255.0, rtol=1e-6)
    assert isinstance(PixelExtractor(6), Extractor)


def test_a_saved_classifier_gives_the_models_features_and_labels(tmp_path) -> None:
    model = Classifier(ClassifierConfig(channels=(8, 16), num_classes=4), seed=3).eval()
    save_classifier(tmp_path, model, 8, ["a", "b", "c", "d"])
    extractor = ClassifierExtractor(tmp_path)
    assert isinstance(extractor, Extractor) and extractor.dim == 16
    x = pictures(5, 8, 1)
    scaled = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = model.features(scaled), model(scaled).argmax(1)
    torch.testing.assert_close(extractor(x), expected[0])
    assert torch.equal(extractor.predict(extractor(x)), expected[1])


@pytest.mark.parametrize("fault", ["missing", "config", "weights"])
def test_an_unusable_classifier_is_one_sentence(tmp_path, fault: str) -> None:
    save_classifier(tmp_path, Classifier(ClassifierConfig(channels=(8,))), 8, list("0123456789"))
    if fault == "missing":
        (tmp_path / "classifier.safetensors").unlink()
    if fault == "config":
        (tmp_path / "classifier.json").write_text('{"model": {"width": 3}}')
    if fault == "weights":
        data = bytearray((tmp_path / "classifier.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "classifier.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="classifier"):
        ClassifierExtractor(tmp_path)


def test_unknown_kinds_and_wrong_files_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="choose one of"):
        load_extractor("resnet")
    with pytest.raises(UserError, match="extractor.weights"):
        load_extractor("inception")
    with pytest.raises(UserError, match="etude data fetch inception"):
        load_extractor("inception", tmp_path / "no.pt")
    (tmp_path / "odd.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="not the known Inception file"):
        load_extractor("inception", tmp_path / "odd.pt")


@pytest.mark.fetched
@pytest.mark.skipif(not INCEPTION.exists(), reason="type: etude data fetch inception")
def test_our_inception_is_the_archives_own_network(tmp_path) -> None:
    archive = torch.jit.load(INCEPTION / "default_1.pt", map_location="cpu")
    extractor = InceptionExtractor(INCEPTION / "default_1.pt")
    x = pictures(2, 299, 3)
    with torch.no_grad():
        expected = archive((x.permute(0, 3, 1, 2).float() - 128) / 128)
    torch.testing.assert_close(extractor(x), expected, rtol=1e-4, atol=1e-4)
    assert extractor(pictures(1, 32, 1)).shape == (1, 2048)

    state = {n: v.contiguous().clone() for n, v in extractor.network.state_dict().items()}
    save_file(state, tmp_path / "inception.safetensors")
    same = InceptionExtractor(tmp_path)
    assert same.weights_sha256 == extractor.weights_sha256
    assert torch.equal(same(x), extractor(x))

    state["conv.weight"][0, 0, 0, 0] += 1
    save_file(state, tmp_path / "inception.safetensors")
    with pytest.raises(UserError, match="not the known Inception file"):
        InceptionExtractor(tmp_path)
