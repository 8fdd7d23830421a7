"""Resizing of 8-bit pictures exactly as Pillow or TensorFlow 1 does it, with normalisation.

Called by the extractors and by evaluation. Filters:

`bicubic`, `bilinear`: Pillow's antialiased resampling, bit for bit. Along an axis of n inputs, of
which the box [lo, hi) is brought to m outputs, with s = (hi - lo) / m and f = max(s, 1), output i
is a sum over the inputs j within `support * f` of its centre c = lo + (i + 1/2) s:

    w_ij = filter((j - c + 1/2) / f) / sum_j filter(...)          float64, on the host
    out_i = clip((sum_j round(2^22 w_ij) in_j + 2^21) >> 22)      int32, exact

(Catmull-Rom's cubic a = -1/2 with support 2, or the triangle with support 1.) Along the width
first, rounded to bytes, then along the height; the other way round where the height loses pixels,
and more than twice as many as the width (the rule since Pillow 13; before, the width was always
first). Weights are whole numbers: there is one right answer, and the reference and every twin give
it.

`tf1`: the bilinear rule of TensorFlow 1 behind all published FIDs: no antialiasing, no half-pixel
centres. Output i reads at i * (n / m), in float32, columns after rows, and is not rounded:

    low + (high - low) * share,   low = floor(i n / m),   high = min(low + 1, n - 1)

Float outputs are normalised in the last pass: (v / 255 - mean) / std as v * scale + offset with
scale = 1 / (255 std) and offset = -mean / std rounded to float32 once.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import backends
from .catalogue import Operator

FILTERS = ("bicubic", "bilinear", "tf1")
LAYOUTS = ("BHWC", "BCHW", "channels_last")
BITS = 22  # of a weight's fraction: 32 - 8 of a byte - 2 of the cubic's overshoot
_OUTPUTS = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_MOST_PIXELS = 1 << 24  # of a side: positions are exact in float32

Box = tuple[float, float, float, float]


def _cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x < 1.0, 1.0 - x, 0.0)


_SHAPES = {"bicubic": (_cubic, 2.0), "bilinear": (_triangle, 1.0)}


@lru_cache(maxsize=512)
def weights(
    filter: str, inputs: int, low: float, high: float, outputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """(bounds (outputs, 2), taps (outputs, ksize)) int32 of one axis: first input and how many.

    Every operation in Pillow's order, in float64; the box is float32 there.
    """
    shape, support = _SHAPES[filter]
    start, end = np.float32(low), np.float32(high)
    scale = float(end - start) / outputs
    stretch = max(scale, 1.0)
    support *= stretch
    ksize = math.ceil(support) * 2 + 1
    centre = float(start) + (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), inputs) - first
    number = np.arange(ksize)
    live = number < count[:, None]
    taps = shape((number + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch))
    taps = np.where(live, taps, 0.0)
    total = np.cumsum(taps, axis=1)[:, -1:]  # in order, as a loop adds
    taps = np.divide(taps, total, out=taps, where=total != 0)
    fixed = np.trunc(taps * (1 << BITS) + np.copysign(0.5, taps))
    bounds = np.stack([first, count], 1).astype(np.int32)
    fixed = fixed.astype(np.int32)
    bounds.flags.writeable = fixed.flags.writeable = False
    return bounds, fixed


@lru_cache(maxsize=512)
def lerps(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high) int32 and share float32, each (outputs,), of one axis of TensorFlow 1's rule."""
    place = np.arange(outputs, dtype=np.float32) * np.float32(inputs / outputs)
    low = np.minimum(np.floor(place), inputs - 1).astype(np.int32)
    high = np.minimum(low + 1, inputs - 1).astype(np.int32)
    share = place - low.astype(np.float32)
    for array in (low, high, share):
        array.flags.writeable = False
    return low, high, share


def affine(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset) float32, each (channels,), of v * scale + offset = (v / 255 - mean) / std."""
    mean, std = (np.broadcast_to(np.asarray(v, np.float64), channels) for v in (mean, std))
    return (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def columns_first(height: int, width: int, size: Sequence[int]) -> bool:
    """Whether Pillow 13 resamples along the height first; the box does not matter to it."""
    lost = height - size[0]
    return lost > 0 and lost > 2 * (width - size[1])


def _axes(
    filter: str, height: int, width: int, box: Box | None, size: tuple[int, int]
) -> list[tuple]:
    """The arguments of `weights` for rows (along the width) and for columns."""
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    return [(filter, width, left, right, size[1]), (filter, height, top, bottom, size[0])]


def _pass(x: Tensor, dim: int, bounds: np.ndarray, taps: np.ndarray) -> Tensor:
    """One axis by Pillow's rule, exact in int32; uint8 in and out."""
    device, rows = x.device, [1] * x.dim()
    rows[dim] = -1
    total = torch.tensor(1 << (BITS - 1), dtype=torch.int32, device=device)
    for k in range(int(bounds[:, 1].max())):
        at = np.minimum(bounds[:, 0] + k, x.shape[dim] - 1)
        tap = torch.tensor(taps[:, k], device=device).reshape(rows)
        total = total + x.index_select(dim, torch.tensor(at, device=device)).int() * tap
    return (total >> BITS).clamp(0, 255).to(torch.uint8)


def _lerp(x: Tensor, dim: int, low: np.ndarray, high: np.ndarray, share: np.ndarray) -> Tensor:
    """One axis by TensorFlow 1's rule, float32 in and out."""
    rows = [1] * x.dim()
    rows[dim] = -1
    first, second = (x.index_select(dim, torch.tensor(at, device=x.device)) for at in (low, high))
    return first + (second - first) * torch.tensor(share, device=x.device).reshape(rows)


def resize_reference(
    images: Tensor,
    size: tuple[int, int],
    *,
    filter: str = "bicubic",
    box: Box | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """`resize` of (B, H, W, C) uint8 to (B, size, size, C) in plain torch."""
    if filter == "tf1":
        x = _lerp(images.float(), 2, *lerps(images.shape[2], size[1]))
        x = _lerp(x, 1, *lerps(images.shape[1], size[0]))
    else:
        across, down = _axes(filter, *images.shape[1:3], box, size)
        order = [(2, across), (1, down)]
        x = images
        for dim, axis in order[::-1] if columns_first(*images.shape[1:3], size) else order:
            x = _pass(x, dim, *weights(*axis))
        if dtype == torch.uint8:
            return x
    scale, offset = affine(mean, std, images.shape[3])
    scale, offset = (torch.tensor(v, device=x.device) for v in (scale, offset))
    return (x.float() * scale + offset).to(dtype)


# One operator for a batch and one for a list of pictures of different sizes. The tables are made on
# the host from the sizes and cached, so these operators are opaque to torch.compile by intent.
_library = torch.library.Library("etude", "FRAGMENT")
_REST = (
    "int[] size, str filter, float[] box, float[] mean, float[] std, ScalarType dtype, bool planar"
)
_library.define(f"resize(Tensor images, {_REST}) -> Tensor")
_library.define(f"resize_list(Tensor[] images, {_REST}) -> Tensor")
_library.define(f"triton_resize(Tensor images, {_REST}) -> Tensor")
_library.define(f"cuda_resize(Tensor images, {_REST}) -> Tensor")
ops = torch.ops.etude


def _made(
    lead: Tensor, count: int, size: Sequence[int], dtype: torch.dtype, planar: bool
) -> Tensor:
    """The output, (B, H, W, C) whose memory is (B, C, H, W) where `planar`."""
    height, width, channels = *size, lead.shape[-1]
    if planar:
        empty = lead.new_empty((count, channels, height, width), dtype=dtype)
        return empty.permute(0, 2, 3, 1)
    return lead.new_empty((count, height, width, channels), dtype=dtype)


def _resize_cpu(
    images: Sequence[Tensor],
    size: Sequence[int],
    filter: str,
    box: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    planar: bool,
) -> Tensor:
    """Pictures (H, W, C) of any sizes and strides by the C++ kernel; box: none, one, or B boxes."""
    lead = images[0]
    out = _made(lead, len(images), size, dtype, planar)
    if out.numel() == 0:
        return out
    numbers: dict[tuple, int] = {}
    rows = []
    for i, image in enumerate(images):
        height, width, _ = image.shape
        one = tuple(box[4 * i : 4 * i + 4]) if len(box) > 4 else tuple(box) or None
        axes = (
            [("tf1", width, size[1]), ("tf1", height, size[0])]
            if filter == "tf1"
            else _axes(filter, height, width, one, tuple(size))
        )
        tables = [numbers.setdefault(axis, len(numbers)) for axis in axes]
        swapped = columns_first(height, width, size)
        rows.append((image.data_ptr(), height, width, *image.stride(), *tables, swapped))
    made = [lerps(*axis[1:]) if filter == "tf1" else weights(*axis) for axis in numbers]
    last = [t[2].ctypes.data if filter == "tf1" else t[1].shape[1] for t in made]
    addresses = [
        (t[0].ctypes.data, t[1].ctypes.data, end) for t, end in zip(made, last, strict=True)
    ]
    scale, offset = affine(mean, std, lead.shape[-1])
    backends.cpp().resize(
        rows,
        addresses,
        filter == "tf1",
        (len(images), *size, lead.shape[-1]),
        out.data_ptr(),
        (torch.uint8, torch.float32, torch.bfloat16).index(dtype),
        planar,
        scale.ctypes.data,
        offset.ctypes.data,
        torch.get_num_threads(),
    )
    if backends.verifying():
        _verify("C++ resize", images, size, filter, box, mean, std, dtype, out)
    return out


def _verify(op, images, size, filter, box, mean, std, dtype, out) -> None:
    """Bytes must be equal; floats within the dtype's tolerance."""
    for i, image in enumerate(images):
        one = tuple(box[4 * i : 4 * i + 4]) if len(box) > 4 else tuple(box) or None
        want = resize_reference(
            image[None], tuple(size), filter=filter, box=one, mean=mean, std=std, dtype=dtype
        )[0]
        got = out[i]
        if dtype == torch.uint8:
            want, got = want.float() * 1e3, got.float() * 1e3  # a step of one is then beyond it
        backends.verify(op, (f"picture {i}",), (got,), (want,))


def _batch_cpu(images, size, filter, box, mean, std, dtype, planar):
    if images.shape[0] == 0:
        return _made(images, 0, size, dtype, planar)
    return _resize_cpu(images.unbind(0), size, filter, box, mean, std, dtype, planar)


_library.impl("resize", _batch_cpu, "CPU")
_library.impl("resize_list", _resize_cpu, "CPU")


@torch.library.register_fake("etude::resize", lib=_library)
def _(images, size, filter, box, mean, std, dtype, planar):
    return _made(images, images.shape[0], size, dtype, planar)


@torch.library.register_fake("etude::triton_resize", lib=_library)
@torch.library.register_fake("etude::cuda_resize", lib=_library)
def _(images, size, filter, box, mean, std, dtype, planar):
    return _made(images, images.shape[0], size, dtype, planar)


@torch.library.register_fake("etude::resize_list", lib=_library)
def _(images, size, filter, box, mean, std, dtype, planar):
    return _made(images[0], len(images), size, dtype, planar)


def _check(
    images: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    size: Sequence[int],
    filter: str,
    boxes: Sequence[Box | None],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """What does not fit, as a ValueError of one sentence; shapes are (H, W, C), one per box."""
    if filter not in FILTERS:
        raise ValueError(f"resize: filter={filter!r} is unknown: use one of {', '.join(FILTERS)}")
    if len(size) != 2 or min(size) < 1 or max(size) > _MOST_PIXELS:
        raise ValueError(f"resize: size must be (height, width) of at least 1, got {tuple(size)}")
    if dtype not in _OUTPUTS:
        raise ValueError(f"resize: dtype must be uint8, float32, bfloat16 or float16, not {dtype}")
    if filter == "tf1" and (dtype == torch.uint8 or any(box is not None for box in boxes)):
        raise ValueError("resize: tf1 never rounds and takes no box: ask for a float dtype")
    channels = shapes[0][2]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"resize: {name} has {len(values)} values for {channels} channels")
    if min(std) <= 0:
        raise ValueError(f"resize: std must be positive, got {tuple(std)}")
    for image, shape, box in zip(images, shapes, boxes, strict=True):
        height, width, depth = shape
        if image.dtype != torch.uint8 or image.device != images[0].device or depth != channels:
            raise ValueError(
                f"resize: pictures must be uint8 of {channels} channels on {images[0].device}, "
                f"got {image.dtype} of {depth} on {image.device}"
            )
        if not 1 <= min(height, width) <= max(height, width) <= _MOST_PIXELS:
            raise ValueError(f"resize: a picture of {width} x {height} pixels has no sides to fit")
        if box is None:
            continue
        left, top, right, bottom = box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"resize: box {tuple(box)} is not inside {width} x {height} pixels")


def resize(
    images: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    *,
    filter: str = "bicubic",
    box: Box | Sequence[Box] | None = None,
    layout: str = "BHWC",
    out_layout: str | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Pictures brought to `size` = (height, width), rounded to bytes or normalised.

    images: uint8 (B, H, W, C), or (B, C, H, W) with `layout="BCHW"`, any strides; or a list of
    pictures (H, W, C) or (C, H, W) of any sizes. Channels are independent (Pillow premultiplies
    alpha; this does not). filter: "bicubic" or "bilinear" of Pillow, "tf1" (float outputs only).
    box: (left, top, right, bottom) in pixels, fractions allowed, what is brought to `size`; for a
    list also one box per picture. dtype: uint8, or float32, bfloat16 or float16 of
    (v / 255 - mean) / std; mean, std: one number, or one per channel. out_layout: "BHWC", "BCHW" or
    "channels_last", which is (B, C, H, W) in (B, H, W, C) memory; the input's by default.

    Returns (B, *size, C) or (B, C, *size). Has no gradient. Errors: ValueError for arguments that
    do not fit together; RuntimeError for a backend asked for by name that cannot run.
    """
    out_layout = out_layout or layout
    if layout not in LAYOUTS[:2] or out_layout not in LAYOUTS:
        raise ValueError(f"resize: layouts are BHWC and BCHW, got {layout} and {out_layout}")
    batch = isinstance(images, Tensor)
    if batch and images.dim() != 4 or not batch and any(i.dim() != 3 for i in images):
        raise ValueError("resize: images must be a tensor of 4 dimensions or a list of 3 each")
    if not batch and not images:
        raise ValueError("resize: the list of pictures is empty")
    if layout == "BCHW":
        images = images.movedim(1, 3) if batch else [image.movedim(0, 2) for image in images]
    boxes = [box] * (1 if batch else len(images))
    if box is not None and len(box) and not isinstance(box[0], (int, float)):
        boxes = list(box)
        if batch or len(boxes) != len(images):
            raise ValueError(f"resize: {len(boxes)} boxes need a list of as many pictures")
    shapes = [images.shape[1:]] if batch else [image.shape for image in images]
    _check([images] if batch else images, shapes, size, filter, boxes, mean, std, dtype)
    flat = [] if box is None else [float(v) for one in boxes for v in one]
    rest = (list(size), filter, flat, list(mean), list(std), dtype, out_layout == "BCHW")
    device = images.device.type if batch else images[0].device.type
    # Bytes in: what a twin must know is the output's type.
    kind = torch.float32 if dtype == torch.uint8 else dtype
    backend = backends.pick("resize", device, kind, twins=_TWINS)
    if backend == "cpp":
        out = ops.resize(images, *rest) if batch else ops.resize_list(images, *rest)
    else:
        out = _any(images, rest, backend) if batch else _each(images, boxes, rest, backend)
    return out if out_layout == "BHWC" else out.permute(0, 3, 1, 2)


def _any(images: Tensor, rest: tuple, backend: str) -> Tensor:
    """A batch by the reference, by Triton or by CUDA."""
    if backend == "triton":
        from . import resizing_triton  # noqa: F401

        return ops.triton_resize(images, *rest)
    if backend == "cuda":
        from . import resizing_cuda  # noqa: F401

        return ops.cuda_resize(images, *rest)
    size, filter, box, mean, std, dtype, planar = rest
    one = tuple(box) or None
    out = resize_reference(
        images, tuple(size), filter=filter, box=one, mean=mean, std=std, dtype=dtype
    )
    return out.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if planar else out.contiguous()


def _each(
    images: Sequence[Tensor], boxes: Sequence[Box | None], rest: tuple, backend: str
) -> Tensor:
    """A list by a backend that takes batches of one size."""
    size, filter, _, mean, std, dtype, planar = rest
    made = []
    for image, box in zip(images, boxes, strict=True):
        flat = [] if box is None else [float(v) for v in box]
        made.append(_any(image[None], (size, filter, flat, mean, std, dtype, planar), backend))
    if planar:
        return torch.cat([m.permute(0, 3, 1, 2) for m in made]).permute(0, 2, 3, 1)
    return torch.cat(made)


_TWINS = ("cpp", "triton", "cuda")
OPERATORS = (
    Operator(
        "resize",
        "Pillow's bicubic and bilinear bit for bit, and TensorFlow 1's",
        _TWINS,
        dtypes="uint8 in; uint8, float32, float16 or bfloat16 out",
    ),
)
