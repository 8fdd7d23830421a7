"""Extractors: preprocessing against independent formulas, precision, saved classifiers."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.metrics.extractors import (
    Backbone,
    Extractor,
    extractor,
    load_extractor,
    resize_antialiased,
    to_channels,
)
from etude.metrics.extractors.classifier import save_classifier
from etude.models.classifier import Classifier, ClassifierConfig


def pictures(rows: int, side: int, channels: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (rows, side, side, channels), dtype=np.uint8))


@pytest.mark.parametrize("size", [16, 100])
def test_antialiased_resize_is_pillows(size: int) -> None:
    x = pictures(1, 41, 1)[0, :, :, 0].numpy().astype(np.float32)
    pillow = Image.fromarray(x, mode="F").resize((size, size), Image.Resampling.BILINEAR)
    found = resize_antialiased(torch.from_numpy(x)[None, None], size)[0, 0]
    np.testing.assert_allclose(found, np.asarray(pillow), atol=2e-3)


def test_grey_is_repeated_and_colour_becomes_pillows_grey() -> None:
    grey, colour = pictures(2, 4, 1), pictures(2, 64, 3)
    repeated = to_channels(grey, 3)
    assert torch.equal(repeated, torch.cat([grey, grey, grey], 3))
    expected = np.stack([np.asarray(Image.fromarray(x.numpy()).convert("L")) for x in colour])
    np.testing.assert_array_equal(to_channels(colour, 1)[..., 0], expected)


def test_pixels_are_themselves() -> None:
    x = pictures(3, 6, 1)
    expected = x.numpy().reshape(3, -1) / 255.0
    found = Extractor("pixels", input_size=6)
    np.testing.assert_allclose(found(x), expected, rtol=1e-6)
    np.testing.assert_allclose(found(x.numpy()[:, ::-1])[:, :6], expected[:, 30:], rtol=1e-6)
    colour = Extractor("pixels", input_size=6, channels=3)(x).reshape(3, 3, 36)
    np.testing.assert_allclose(colour[:, 1], expected, rtol=1e-6)


@extractor("of a test")
class Sums(Backbone):
    """Sums of pictures and of their squares, and what dtype they were made in."""

    version, input_size, resize, channels = "1", 4, "none", 3
    taps = {"sum": 3, "squares": 1}
    needs_weights = False

    def __init__(self, weights: None, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return images.to(dtype) / 256

    def forward(self, x: torch.Tensor, taps) -> dict[str, torch.Tensor]:
        assert x.dtype == self.scale.dtype and not torch.is_grad_enabled()
        x = x * self.scale
        made = {"sum": lambda: x.sum((1, 2)), "squares": lambda: (x * x).sum((1, 2, 3))[:, None]}
        return {tap: made[tap]() for tap in taps}


def test_one_forward_gives_every_tap_by_its_feature_name() -> None:
    both = Extractor("of a test", taps=("sum", "squares"), scale=2.0)
    x = pictures(3, 4, 3)
    found, sums = both.features(x), x.numpy().astype(np.float64) / 128
    assert both.dims == {"of a test": 3, "of a test/squares": 1} and list(found) == [*both.dims]
    np.testing.assert_allclose(found["of a test"], sums.sum((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["of a test/squares"][:, 0], (sums**2).sum((1, 2, 3)), 1e-6)
    alone = load_extractor("of a test/squares", scale=2.0)
    assert (alone.name, alone.dim) == ("of a test/squares", 1)
    assert torch.equal(alone(x), found["of a test/squares"])
    assert not any(p.requires_grad for p in alone.backbone.parameters())


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_rounds_and_returns_float32(dtype: str, bits: int) -> None:
    x = pictures(8, 4, 3)
    exact = Extractor("of a test")(x)
    found = Extractor("of a test", dtype=dtype)(x)
    assert found.dtype == torch.float32
    error = ((found - exact) / exact).abs().max()
    assert 0 < error < 2.0 ** (1 - bits)


def test_what_the_store_must_know_of_the_arithmetic() -> None:
    said = [Extractor("of a test", dtype=d, compile=c).arithmetic
            for d in ("float32", "bfloat16") for c in (False, True)]  # fmt: skip
    assert said == ["float32", "float32, compiled", "bfloat16", "bfloat16, compiled"]


def test_compiled_features_are_the_plain_ones() -> None:
    taps = ("sum", "squares")
    plain, compiled = (Extractor("of a test", taps=taps, compile=c) for c in (False, True))
    first, second = pictures(3, 4, 3), 255 - pictures(3, 4, 3)
    found = [compiled.features(x) for x in (first, second)]
    for x, of in zip((first, second), found, strict=True):
        for name, expected in plain.features(x).items():
            torch.testing.assert_close(of[name], expected, rtol=1e-6, atol=0)


@extractor("products of a test")
class Products(Backbone):
    """Matrix products on the way to the network and in it."""

    version, input_size, resize, channels = "1", 64, "none", 3
    taps = {"sum": 64}
    needs_weights = False

    def __init__(self, weights: None) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(64, 64)

    def prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x = images.permute(0, 3, 1, 2).float() / 255
        return (x @ torch.linspace(-1, 1, 64 * 64).reshape(64, 64).to(x.device)).to(dtype)

    def forward(self, x: torch.Tensor, taps) -> dict[str, torch.Tensor]:
        return {"sum": self.mix(x).sum((1, 2))}


@contextmanager
def trainer(precision: str) -> Iterator[None]:
    """Autocast around a validation, and float32 products of less precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", torch.bfloat16):
        yield
    assert torch.get_float32_matmul_precision() == precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_trainers_arithmetic_does_not_reach_the_features(precision: str) -> None:
    found, x = Extractor("products of a test"), pictures(4, 64, 3)
    prepared, expected = found.prepare(x), found(x)
    weight = found.backbone.mix.weight
    with trainer(precision):
        assert (x[0, :, :, 0].float() @ weight).dtype == torch.bfloat16
        assert torch.equal(found.prepare(x), prepared) and torch.equal(found(x), expected)
        inside = x[0, :, :, 0].float()
        with torch.autocast("cpu", enabled=False):  # the trainer's own again
            error = (inside @ weight - inside.double() @ weight.double()).abs().max()
        assert (error > 0.01) == (precision == "medium")


def test_a_process_may_change_its_products_after_a_call() -> None:
    """What a call found is put back, and what was inherited stays so."""
    every, products = torch.backends.mkldnn, torch.backends.mkldnn.matmul
    before = every.fp32_precision, products.fp32_precision
    products.fp32_precision = "none"  # as it is until somebody asks for another
    try:
        for word in ("bf16", "ieee"):
            every.fp32_precision = word
            Extractor("products of a test")(pictures(1, 64, 3))
            assert products.fp32_precision == word
    finally:
        every.fp32_precision, products.fp32_precision = before


def test_a_saved_classifier_gives_the_models_features_and_labels(tmp_path) -> None:
    model = Classifier(ClassifierConfig(channels=(8, 16), num_classes=4), seed=3).eval()
    save_classifier(tmp_path, model, 8, ["a", "b", "c", "d"])
    judge = Extractor("classifier", tmp_path)
    assert judge.dim == 16 and judge.backbone.classes == ["a", "b", "c", "d"]
    x = pictures(5, 8, 1)
    scaled = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = model.features(scaled), model(scaled).argmax(1)
    torch.testing.assert_close(judge(x), expected[0])
    assert torch.equal(judge.backbone.predict(judge(x)), expected[1])


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
        Extractor("classifier", tmp_path)


REFUSED = [
    (("resnet",), {}, "there is no extractor 'resnet'; choose one of classifier"),
    (("classifier",), {}, "set its weights to a file or folder"),
    (("pixels", "file"), {"input_size": 3}, "has no weights"),
    (("pixels",), {}, "needs its option input_size"),
    (("of a test",), {"sides": 3}, "no option 'sides'; it has scale"),
    (("of a test",), {"dtype": "float8"}, "no dtype 'float8'; choose one of float32"),
    (("of a test",), {"dtype": "tf32"}, "tf32 is an arithmetic of CUDA devices"),
    (("of a test/logits",), {}, "no features 'logits'; choose of sum, squares"),
    (("of a test/",), {}, "names no features"),
]


@pytest.mark.parametrize(("given", "options", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(given, options, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_extractor(*given, **options)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4).byte()])
def test_other_pictures_than_uint8_bhwc_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        Extractor("of a test")(wrong)
