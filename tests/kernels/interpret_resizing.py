"""Run by test_resizing_triton.py with TRITON_INTERPRET=1: both kernels against the reference."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_resizing import pictures

from etude import kernels
from etude.kernels import resizing_triton

# (before, after, channels, layout, out_layout, dtype, filter, box)
CASES = [
    ((20, 17), (13, 29), 3, "BHWC", "BHWC", "uint8", "bicubic", None),
    ((20, 17), (13, 29), 3, "BCHW", "BCHW", "float32", "bilinear", None),
    ((9, 40), (21, 7), 1, "BHWC", "BCHW", "float16", "bicubic", (3.5, 1.0, 33.25, 8.5)),
    ((40, 9), (5, 30), 3, "BHWC", "channels_last", "float32", "bicubic", None),  # columns first
    ((1, 1), (3, 2), 5, "BCHW", "BHWC", "uint8", "bilinear", None),
    ((11, 14), (30, 9), 3, "BHWC", "BCHW", "float32", "tf1", None),
    ((11, 14), (6, 25), 3, "BCHW", "channels_last", "float16", "tf1", None),
]


def format_of(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def main() -> None:
    for before, after, channels, layout, out_layout, dtype, filter, box in CASES:
        x = pictures(2, before, channels)
        x = x.permute(0, 3, 1, 2).contiguous() if layout == "BCHW" else x
        rest = {"filter": filter, "box": box, "layout": layout, "out_layout": out_layout}
        rest |= {"dtype": getattr(torch, dtype)}
        if dtype != "uint8":
            rest |= {"mean": (0.4,) * channels, "std": (0.3,) * channels}
        got, again = kernels.resize(x, after, **rest), kernels.resize(x, after, **rest)
        with kernels.use_backend("reference"):
            want = kernels.resize(x, after, **rest)
        row = {
            "case": [before, after, channels, layout, out_layout, dtype, filter],
            "dtype": dtype,
            "error": float((got.double() - want.double()).abs().max()),
            "dense": got.is_contiguous(memory_format=format_of(out_layout)),
            "repeats": torch.equal(got, again),
        }
        print(json.dumps(row))
    resizing_triton._MOST_PICTURES = 2  # five pictures are then three launches
    x = pictures(5, (9, 7))
    for filter, dtype in (("bicubic", torch.uint8), ("tf1", torch.float32)):
        got = kernels.resize(x, (4, 6), filter=filter, out_layout="BCHW", dtype=dtype)
        with kernels.use_backend("reference"):
            want = kernels.resize(x, (4, 6), filter=filter, out_layout="BCHW", dtype=dtype)
        error = float((got.double() - want.double()).abs().max())
        kind = str(dtype).removeprefix("torch.")
        print(json.dumps({"case": "launches", "dtype": kind, "error": error}))
    images = [pictures(1, size)[0] for size in ((8, 12), (5, 3))]
    got = kernels.resize(images, (7, 6))
    with kernels.use_backend("reference"):
        same = torch.equal(got, kernels.resize(images, (7, 6)))
    print(json.dumps({"case": "list", "dtype": "uint8", "error": 0.0 if same else 255.0}))


main()
