"""Run by test_groupnorm_triton.py with TRITON_INTERPRET=1: both ways of launching, and float64."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_groupnorm import exact, make, ours, run, wide

from etude import kernels
from etude.kernels.groupnorm_triton import LaunchConfig

# Groups on chip: odd sizes, one position, one channel each. In parts: one chunk and several, with
# remainders in positions and channels.
CASES = [
    ((2, 12, 3, 5), 4),
    ((1, 6, 1, 1), 2),
    ((2, 3, 4, 4), 3),
    ((1, 72, 37, 33), 2),
    ((2, 20, 40, 35), 1),
]


def main() -> None:
    for shape, groups in CASES:
        for silu in (True, False):
            for dtype in (torch.float32, torch.float16):
                data = make(shape, dtype)
                with kernels.use_backend("triton", verify=True):
                    got = run(ours, data, groups, silu)
                again = run(ours, data, groups, silu)
                want = run(exact, wide(data), groups, silu)
                errors = {}
                for key in want:
                    size = float(want[key].square().mean().sqrt())
                    error = float((got[key].double() - want[key]).square().mean().sqrt())
                    errors[key] = error / max(size, 0.1)
                S, C = shape[2] * shape[3], shape[1]
                whole = LaunchConfig.for_shape(S, C, C // groups, backward=True).whole
                row = {
                    "case": [*shape, groups, silu],
                    "whole": whole,
                    "dtype": str(dtype).removeprefix("torch."),
                    "errors": errors,
                    "repeats": all(torch.equal(got[k], again[k]) for k in got),
                }
                print(json.dumps(row))


main()
