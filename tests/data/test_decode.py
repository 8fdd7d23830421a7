"""Both decoders against Pillow's own steps, each other, and pictures that DALI cannot read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from etude.core.errors import UserError
from etude.data import decode_dali, decode_torch
from etude.data.augment import AugmentConfig, geometry
from etude.data.shards import Sample

RNG = np.random.default_rng(1)
needs_dali = pytest.mark.skipif(bool(decode_dali.why_missing()), reason=decode_dali.why_missing())


def _encode(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _pixels(number: int, noise: bool = False) -> np.ndarray:
    rng = np.random.default_rng(number)
    height, width = (int(n) for n in rng.integers(20, 200, 2))
    if noise:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def _sample(data: bytes, number: int = 0) -> Sample:
    return Sample(str(number), data, "x", 0, "", "s.tar")


def _mixed(noise: bool) -> tuple[list[Sample], np.ndarray]:
    forms = [
        ("PNG", {}),
        ("JPEG", {"quality": 90, "subsampling": 0}),
        ("JPEG", {"quality": 90, "subsampling": 2}),
        ("JPEG", {"quality": 75, "progressive": True}),
    ]
    samples, sizes = [], []
    for number in range(24):
        pixels = _pixels(number, noise)
        pixels = pixels[..., 0] if number % 5 == 4 else pixels
        kind, options = forms[number % 4]
        samples.append(_sample(_encode(pixels, kind, **options), number))
        sizes.append(pixels.shape[:2])
    return samples, np.array(sizes)


@pytest.mark.parametrize("channels", [1, 3])
def test_torch_decoder_is_crop_resize_flip_of_pillow(channels: int) -> None:
    samples, sizes = _mixed(noise=False)
    config = AugmentConfig(image_size=40, crop="random", flip=True, channels=channels)
    cut = geometry(config, 5, np.arange(24), sizes[:, 0], sizes[:, 1])
    images = decode_torch.Decoder(40, channels, 2)(samples, cut)
    assert images.dtype == torch.float32 and images.shape == (24, channels, 40, 40)
    assert cut.flip.any() and not cut.flip.all()
    for row, sample in enumerate(samples):
        top, left, height, width, flip = cut.row(row)
        image = Image.open(io.BytesIO(sample.data)).convert("L" if channels == 1 else "RGB")
        image = Image.fromarray(np.asarray(image)[top : top + height, left : left + width])
        pixels = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)).reshape(40, 40, -1)
        expected = (pixels[:, ::-1] if flip else pixels) / 127.5 - 1.0
        assert np.abs(images[row].permute(1, 2, 0).numpy() - expected).max() < 1e-6


@needs_dali
@pytest.mark.parametrize("crop", ["none", "center", "random"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("noise", [False, True])
def test_decoders_agree_within_the_stated_bounds(crop: str, channels: int, noise: bool) -> None:
    samples, sizes = _mixed(noise)
    config = AugmentConfig(image_size=48, crop=crop, flip=True, channels=channels)
    cut = geometry(config, 5, np.arange(24), sizes[:, 0], sizes[:, 1])
    dali = decode_dali.Decoder(48, channels, 1)
    ours, faults = dali.decode(samples, cut)
    reference, _ = decode_torch.Decoder(48, channels, 1).decode(samples, cut)
    assert not faults and dali.fallbacks == 0
    difference = (ours.int() - reference.int()).abs().float()
    assert difference.flatten(1).mean(1).max() <= decode_dali.MEAN_BOUND
    assert difference.max() <= (decode_dali.MAX_BOUND if noise else 10)
    part, _ = dali.decode(samples[:5], cut.select(list(range(5))))
    assert torch.equal(part, ours[:5]), "a picture depends on its batch"


@needs_dali
def test_dali_hands_over_what_it_cannot_read() -> None:
    pixels = _pixels(3)
    height, width = pixels.shape[:2]
    clear = np.dstack([pixels, np.full((height, width), 100, np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 3
    samples = [
        _sample(_encode(pixels, "PNG")),
        _sample(_encode(clear, "PNG")),
        _sample(_encode(pixels, "WEBP", lossless=True)),
        _sample(_encode(pixels, "JPEG", exif=exif)),
        _sample(_encode(pixels[..., 0].astype(np.uint16) * 256, "PNG")),
    ]
    sizes = np.full(5, height), np.full(5, width)
    cut = geometry(AugmentConfig(image_size=32), 0, np.arange(5), *sizes)
    dali = decode_dali.Decoder(32, 3, 1)
    ours = dali(samples, cut)
    reference = decode_torch.Decoder(32, 3, 1)(samples, cut)
    assert dali.fallbacks == 4 and torch.equal(ours[1:], reference[1:])
    assert (ours[0] - reference[0]).abs().max() < 10 / 127.5


@needs_dali
def test_a_failed_batch_is_judged_by_the_torch_decoder() -> None:
    good, bad = _encode(_pixels(3), "JPEG"), bytearray(_encode(_pixels(3), "JPEG"))
    start = bad.index(b"\xff\xda")
    bad[start + 14 :] = b"\xff\xd9"  # no coefficients, yet an end mark
    height, width = _pixels(3).shape[:2]
    cut = geometry(
        AugmentConfig(image_size=16), 0, np.arange(3), np.full(3, height), np.full(3, width)
    )
    samples = [_sample(good), _sample(bytes(bad)), _sample(good)]
    dali, reference = decode_dali.Decoder(16, 3, 1), decode_torch.Decoder(16, 3, 1)
    images, faults = dali.decode(samples, cut)
    expected, reasons = reference.decode(samples, cut)
    assert faults.keys() == reasons.keys()
    assert (images[0].int() - expected[0].int()).abs().max() <= 10
    again, faults = dali.decode(samples[:1], cut.select([0]))
    assert not faults and (again[0].int() - expected[0].int()).abs().max() <= 10


def test_a_bad_picture_in_a_direct_call_is_a_user_error() -> None:
    data = _encode(_pixels(1), "PNG")
    cut = geometry(AugmentConfig(image_size=16), 0, np.arange(1), np.array([9]), np.array([9]))
    with pytest.raises(UserError, match=r"s\.tar: 0: the PNG|stops inside"):
        decode_torch.Decoder(16, 3)([_sample(data[:-20])], cut)
