"""What an encoded picture is, read from its header; called by the decoders and the loader.

The size is needed before decoding, because crops are drawn from it and DALI decodes the crop
alone. JPEG markers follow ITU-T T.81 annex B, PNG chunks ISO/IEC 15948, the orientation tag
Exif 2.32 section 4.6.4 (tag 0x0112). A file that stops early is refused here, before any decoder
sees it, so that every decoder skips the same pictures.
"""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_SIDE = 20_000
MAX_PIXELS = 89_478_485  # Pillow's own limit for pictures it does not warn about

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_NOT_A_FRAME = (0xC4, 0xC8, 0xCC)  # tables and extensions among the SOF marker numbers
# Tables, scans, comments and application data; zero bytes and restarts belong to a scan's data.
_SEGMENTS = frozenset({0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)})
_IS_MARKER = np.ones(256, dtype=bool)
_IS_MARKER[[0x00, 0xFF, *range(0xD0, 0xD8)]] = False
_ORIENTATION = 0x0112


class BadPicture(Exception):
    """A picture that cannot be used; the message says why. The loader takes another one."""


@dataclass(frozen=True)
class Picture:
    """Facts from a header.

    Attributes:
        kind: "jpeg", "png" or "other".
        height, width: pixels of the upright picture, the Exif orientation applied.
        channels: 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha or CMYK; 0 unknown.
        bits: bits per channel; 0 unknown.
        orientation: Exif orientation, 1 (upright as stored) to 8.
        plain: 8-bit grey or colour, upright, without palette or transparency, JPEG or PNG: the
            pictures that every decoder reads alike.
    """

    kind: str
    height: int
    width: int
    channels: int
    bits: int
    orientation: int
    plain: bool


def probe(data: bytes | memoryview) -> Picture:
    """Reads the header of an encoded picture; raises `BadPicture` with the reason."""
    if len(data) == 0:
        raise BadPicture("the file is empty")
    try:
        if data[:2] == b"\xff\xd8":
            picture = _probe_jpeg(data)
        elif data[:8] == _PNG_MAGIC:
            picture = _probe_png(data)
        else:
            picture = _probe_other(data)
    except (struct.error, IndexError):
        raise BadPicture("the file stops inside its header") from None
    if picture.height < 1 or picture.width < 1:
        raise BadPicture(f"the picture has no pixels ({picture.width} x {picture.height})")
    if max(picture.height, picture.width) > MAX_SIDE:
        size = f"{picture.width} x {picture.height}"
        raise BadPicture(f"the picture is {size}; the longest side may have {MAX_SIDE} pixels")
    if picture.height * picture.width > MAX_PIXELS:
        size = f"{picture.width} x {picture.height}"
        raise BadPicture(f"the picture is {size}; at most {MAX_PIXELS} pixels are decoded")
    return picture


def _turned(orientation: int, height: int, width: int) -> tuple[int, int]:
    return (width, height) if orientation >= 5 else (height, width)


def _probe_jpeg(data: bytes | memoryview) -> Picture:
    """Walks every segment and scan to the end mark: decoders that read a part of the picture would
    otherwise accept files that others refuse. What follows the end mark is ignored."""
    position, orientation, frame = 2, 1, None
    view = np.frombuffer(data, np.uint8)
    starts = np.flatnonzero(view[:-1] == 0xFF)
    starts = starts[_IS_MARKER[view[starts + 1]]]
    while True:
        number = int(np.searchsorted(starts, position))
        if number == len(starts):
            raise BadPicture("the JPEG is truncated: its end mark is missing")
        position = int(starts[number]) + 2
        marker = int(view[position - 1])
        if marker == 0xD9:
            break
        if marker == 0x01:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        is_frame = 0xC0 <= marker <= 0xCF and marker not in _NOT_A_FRAME
        if length < 2 or not (marker in _SEGMENTS or is_frame and frame is None):
            raise BadPicture(f"the JPEG has a broken segment (marker {marker:02x})")
        body, position = position + 2, position + length
        if is_frame:
            frame = struct.unpack_from(">BHHB", data, body)
        elif marker == 0xE1 and bytes(data[body : body + 6]) == b"Exif\0\0":
            orientation = _exif_orientation(bytes(data[body + 6 : position]))
    if frame is None:
        raise BadPicture("the JPEG has no frame header")
    bits, height, width, channels = frame
    height, width = _turned(orientation, height, width)
    plain = channels in (1, 3) and bits == 8 and orientation == 1
    return Picture("jpeg", height, width, channels, bits, orientation, plain)


def _probe_png(data: bytes | memoryview) -> Picture:
    view, position, orientation = memoryview(data), 8, 1
    header, clear, ended = None, False, False
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(view[position + 4 : end]) != checksum:
            raise BadPicture(f"the PNG is damaged: wrong checksum of its {name!r} chunk")
        if name == b"IHDR":
            header = struct.unpack_from(">IIBB", data, position + 8)
        elif name == b"tRNS":
            clear = True
        elif name == b"eXIf":
            orientation = _exif_orientation(bytes(view[position + 8 : end]))
        elif name == b"IEND":
            ended = True
            break
        position = end + 4
    if header is None or not ended:
        raise BadPicture("the PNG is truncated: its end chunk is missing")
    width, height, bits, colour = header
    if colour not in _PNG_CHANNELS:
        raise BadPicture(f"the PNG has the unknown colour type {colour}")
    height, width = _turned(orientation, height, width)
    plain = bits == 8 and colour in (0, 2) and not clear and orientation == 1
    return Picture("png", height, width, _PNG_CHANNELS[colour], bits, orientation, plain)


def _probe_other(data: bytes | memoryview) -> Picture:
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = int(image.getexif().get(_ORIENTATION, 1))
            orientation = orientation if 1 <= orientation <= 8 else 1
            height, width = _turned(orientation, image.height, image.width)
    except Exception as error:  # Pillow's format plug-ins raise many kinds on damaged files
        raise BadPicture(f"not a picture that can be read ({_line(error)})") from None
    return Picture("other", height, width, 0, 0, orientation, False)


def _exif_orientation(exif: bytes) -> int:
    """The orientation in a TIFF block, 1 when it is absent or nonsense."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:120]
