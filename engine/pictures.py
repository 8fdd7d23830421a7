"""Pictures for people: grids, side-by-side pairs, PNG bytes, and a preview in the terminal.

Called by the run's page, by `etude start` for its contact sheet and by training for its grids.
Pictures are uint8 arrays (N, H, W, C) with C of 1 or 3; nothing here touches a model or a file.
"""

import io
import os
import sys

import numpy as np
from PIL import Image

CELL = 64  # tiny pictures are enlarged until a cell is at least this many pixels wide
FRAME = 24  # the grey level between pictures: quiet on a light and on a dark page
RAMP = " .:-=+*#%@"


def as_rgb(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 from (N, H, W), (N, H, W, 1), (N, H, W, 3) or (N, H, W, 4) uint8."""
    if images.dtype != np.uint8:
        raise ValueError(f"pictures must be uint8 in [0, 255], not {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"pictures must be (N, H, W, 1 or 3), not {images.shape}")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images[..., :3]


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """(H, W, 3) uint8 enlarged `scale` times with a smooth (bicubic) filter."""
    if scale == 1:
        return image
    size = (image.shape[1] * scale, image.shape[0] * scale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def fitting_scale(width: int, cell: int = CELL) -> int:
    """The smallest whole factor that makes a picture `width` pixels wide at least `cell` wide."""
    return max(1, -(-cell // width))


def picture_grid(
    images: np.ndarray, columns: int | None = None, scale: int | None = None, gap: int = 2
) -> np.ndarray:
    """Pictures in rows, left to right, with a thin dark frame.

    Args:
        images: (N, H, W, C) uint8, C of 1 or 3, N at least 1.
        columns: pictures per row; the nearest square by default.
        scale: enlargement factor of each picture; by default tiny pictures grow to 64 pixels.
        gap: pixels between pictures and around the grid.

    Returns:
        (rows * (H * scale + gap) + gap, columns * (W * scale + gap) + gap, 3) uint8.
    """
    pictures = as_rgb(images)
    count, height, width = pictures.shape[:3]
    if count == 0:
        raise ValueError("a grid needs at least one picture")
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    scale = scale or fitting_scale(width)
    rows = -(-count // columns)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.full((rows * step_y + gap, columns * step_x + gap, 3), FRAME, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = gap + number // columns * step_y, gap + number % columns * step_x
        sheet[top : top + height * scale, left : left + width * scale] = enlarge(picture, scale)
    return sheet


def side_by_side(left: np.ndarray, right: np.ndarray, cell: int = 96) -> np.ndarray:
    """One picture beside another, (H', 2 W' + 2, 3) uint8, each enlarged to `cell` pixels."""
    return picture_grid(np.stack([left, right]), 2, fitting_scale(left.shape[1], cell), gap=2)


def png(image: np.ndarray) -> bytes:
    """PNG bytes of an (H, W, 3) or (H, W) uint8 picture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def terminal_picture(image: np.ndarray, width: int = 24, colour: bool | None = None) -> str:
    """A picture as text, for the first recognisable sample in the terminal.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) uint8.
        width: columns of the drawing; in plain mode every pixel takes two characters.
        colour: True draws two pixels per character with Unicode half blocks and 24-bit colour,
            False a plain ramp of ten grey levels in ASCII. None asks the terminal: plain when the
            output is redirected, cannot encode the blocks, or NO_COLOR is set.

    Returns:
        Lines joined by newlines, without a trailing newline.
    """
    if colour is None:
        colour = _terminal_has_colour()
    pixels = as_rgb(image[None])[0]
    columns = width if colour else width // 2
    rows = max(1, round(columns * pixels.shape[0] / pixels.shape[1]))
    rows += rows % 2 if colour else 0
    small = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC)
    return _blocks(np.asarray(small)) if colour else _ramp(np.asarray(small.convert("L")))


def _terminal_has_colour() -> bool:
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    return sys.stdout.isatty() and "utf" in encoding and not os.environ.get("NO_COLOR")


def _blocks(pixels: np.ndarray) -> str:
    lines = []
    for upper, lower in zip(pixels[0::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\u2580"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _ramp(grey: np.ndarray) -> str:
    levels = grey.astype(int) * len(RAMP) // 256
    return "\n".join("".join(RAMP[level] * 2 for level in row) for row in levels)
