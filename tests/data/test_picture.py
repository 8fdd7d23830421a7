"""Headers against Pillow on every kind of picture, and the reason for every broken one."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from etude.data.decode_torch import decode_picture
from etude.data.picture import BadPicture, probe

RNG = np.random.default_rng(0)
PIXELS = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((37, 23))
)


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _encode(Image.fromarray(PIXELS), kind, exif=_exif(orientation), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    picture = probe(data)
    assert (picture.width, picture.height) == upright.size
    assert picture.orientation == orientation and picture.plain == (
        orientation == 1 and kind != "WEBP"
    )
    assert np.array_equal(np.asarray(decode_picture(data, 3)), np.asarray(upright))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_headers(mode: str, progressive: bool) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    data = _encode(image, "JPEG", progressive=progressive, comment=b"\xff\xc0 not a frame \xff\xd9")
    picture = probe(data)
    assert (picture.width, picture.height, picture.bits) == (37, 23, 8)
    assert picture.channels == len(mode) and picture.plain == (mode != "CMYK")
    assert probe(data + b"appended by a camera").height == 23
    with pytest.raises(BadPicture, match="truncated"):
        probe(data[: len(data) * 2 // 3])


def test_cmyk_becomes_the_right_colours() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    pixel = np.asarray(decode_picture(_encode(cyan, "JPEG", quality=100), 3))[8, 8].astype(int)
    assert abs(pixel - [0, 255, 255]).max() <= 4


def test_grey_alpha_palette_and_16_bits() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    assert np.array_equal(
        np.asarray(decode_picture(_encode(grey, "PNG"), 3)), np.repeat(PIXELS[..., :1], 3, axis=2)
    )
    clear = np.dstack([PIXELS, np.zeros_like(PIXELS[..., 0])])
    clear[:, :10, 3], clear[:, 10:20, 3] = 255, 128
    seen = np.asarray(decode_picture(_encode(Image.fromarray(clear), "PNG"), 3)).astype(int)
    part = clear[..., 3:] / 255.0
    assert abs(seen - (clear[..., :3] * part + 255 * (1 - part))).max() <= 1  # over white
    palette = Image.fromarray(PIXELS).quantize(16)
    data = _encode(palette, "PNG", transparency=3)
    assert not probe(data).plain
    solid = np.asarray(palette.convert("RGB")).copy()
    solid[np.asarray(palette) == 3] = 255
    assert np.array_equal(np.asarray(decode_picture(data, 3)), solid)


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bit_pngs_keep_their_high_byte(colour: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    wide = RNG.integers(0, 65536, (4, 3, channels), dtype=np.uint16)
    if channels in (2, 4):
        wide[..., -1] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    data = _png(3, 4, 16, colour, rows)
    picture = probe(data)
    assert (picture.height, picture.width, picture.bits, picture.plain) == (4, 3, 16, False)
    high = (wide >> 8).astype(int)[..., : channels - (channels in (2, 4))]
    seen = np.asarray(decode_picture(data, 3)).astype(int)
    assert abs(seen - np.broadcast_to(high, seen.shape)).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"GIF89a", "cannot|not a picture"),
        (b"not a picture at all", "not a picture"),
        (b"\xff\xd8\xff\xe0", "stops inside its header"),
        (b"\xff\xd8\xff\xd9", "no frame"),
        (_png(20_001, 1, 8, 0, b""), "20001 x 1"),
        (_png(20_000, 20_000, 8, 2, b""), "at most"),
        (_png(0, 5, 8, 0, b""), "no pixels"),
        (_png(5, 5, 8, 0, b"")[:-6], "stops inside|truncated"),
    ],
)
def test_broken_pictures_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadPicture, match=reason):
        probe(data)


def test_a_damaged_png_chunk_is_found() -> None:
    data = bytearray(_encode(Image.fromarray(PIXELS), "PNG"))
    data[60] ^= 1
    with pytest.raises(BadPicture, match="checksum"):
        probe(bytes(data))


def test_random_bytes_never_raise_anything_else() -> None:
    sources = [
        _encode(Image.fromarray(PIXELS), kind, exif=_exif(6)) for kind in ("JPEG", "PNG", "WEBP")
    ]
    for case in range(600):
        data = bytearray(sources[case % 3])
        for place in RNG.integers(0, len(data), 1 + case % 4):
            data[place] = RNG.integers(0, 256)
        data = bytes(data[: RNG.integers(0, len(data) + 1)] if case % 2 else data)
        try:
            probe(data)
            decode_picture(data, 3)
        except BadPicture:
            pass
