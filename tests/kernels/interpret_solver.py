"""Run by test_solver_triton.py with TRITON_INTERPRET=1: steps of every kind, and bytes."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_solver import exact, make, ours

from etude import kernels

LAST = torch.channels_last
SHAPES = (((2, 4, 16, 20), "nchw"), ((2, 4, 5, 7), "nhwc"), ((1, 3), "nchw"))


def main() -> None:
    for method, prediction, scales in (
        ("ddim", "flow", 0),
        ("ddim", "eps", 1),
        ("dpmpp_2m", "v", 2),
        ("ddpm", "eps", 1),
    ):
        for shape, layout in SHAPES:
            for dtype in (torch.float32, torch.float16):
                data = make(shape, scales, dtype)
                if layout == "nhwc":
                    for name in ("x", "prediction"):
                        data[name] = data[name].contiguous(memory_format=LAST)
                channels = 3 if scales else None
                got = ours(data, method, prediction, channels)
                again = ours(data, method, prediction, channels)
                errors = []
                for a, b in zip(got, exact(data, method, prediction, channels), strict=True):
                    errors.append(float((a - b).norm() / b.norm()))
                row = {
                    "case": [method, prediction, scales, list(shape), str(dtype)],
                    "error": max(errors),
                    "repeats": all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
                }
                print(json.dumps(row))
    for shape in ((2, 3, 20, 21), (1, 1, 3, 3), (1, 4, 1, 5)):
        for dtype in (torch.float32, torch.float16):
            images = torch.linspace(-1.2, 1.2, torch.Size(shape).numel()).view(shape).to(dtype)
            images.view(-1)[0] = float("nan")
            got, want = kernels.to_uint8(images), kernels.to_uint8_reference(images.nan_to_num(-1))
            print(json.dumps({"bytes": bool(torch.equal(got, want))}))


main()
