"""Run by test_adaln_triton.py with TRITON_INTERPRET=1: every operator against float64 autograd."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_adaln import exact, make, ours, packed, run

# Widths in one piece and in two, with and without a column mask; several rows in a forward tile
# (16 of them, or 5: a tile that is not full), several chunks of a sample (67 rows).
CASES = [
    (ours, "adaln_modulate", "layernorm", (2, 5, 63), False),
    (packed, "adaln_modulate", "rmsnorm", (1, 67, 3), False),
    (ours, "gate_residual", "layernorm", (2, 5, 72), False),
    (ours, "gate_residual", "layernorm", (3, 1, 63), True),
    (ours, "gate_residual_adaln", "rmsnorm", (2, 5, 200), True),
    (packed, "gate_residual_adaln", "layernorm", (1, 67, 12), True),
    (packed, "gate_residual_adaln", "layernorm", (2, 5, 144), True),
    (packed, "gate_residual_adaln", "layernorm", (1, 3, 1152), False),
]


def main() -> None:
    for function, op, norm, shape, bias in CASES:
        for dtype in (torch.float32, torch.float16):
            data = make(*shape, dtype, bias=bias)
            got, again = run(function, op, data, norm), run(function, op, data, norm)
            want = run(exact, op, {k: v.double() for k, v in data.items()}, norm)
            errors = []
            for name in want:
                size = float(want[name].square().mean().sqrt())
                error = float((got[name].double() - want[name]).square().mean().sqrt())
                # With few columns dx nearly cancels: an absolute floor beside the relative bound.
                errors.append(error / max(size, 1e-2))
            row = {
                "op": op,
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "names": sorted(got) == sorted(want),
                "error": max(errors),
                "repeats": all(torch.equal(got[n], again[n]) for n in got),
            }
            print(json.dumps(row))


main()
