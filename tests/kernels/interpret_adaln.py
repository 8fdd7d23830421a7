"""Run by test_triton.py with TRITON_INTERPRET=1: every operator against float64 autograd."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_adaln import exact, make, ours, run

CASES = [
    (op, norm, shape)
    for op, norm in (
        ("adaln_modulate", "layernorm"),
        ("adaln_modulate", "rmsnorm"),
        ("gate_residual", "layernorm"),
        ("gate_residual_adaln", "layernorm"),
        ("gate_residual_adaln", "rmsnorm"),
    )
    for shape in ((2, 5, 63), (1, 67, 3))
]


def main() -> None:
    for op, norm, shape in CASES:
        for dtype in (torch.float32, torch.float16):
            data = make(*shape, dtype)
            got, again = run(ours, op, data, norm), run(ours, op, data, norm)
            want = run(exact, op, {k: v.double() for k, v in data.items()}, norm)
            errors = []
            for name in want:
                size = float(want[name].square().mean().sqrt())
                error = float((got[name].double() - want[name]).square().mean().sqrt())
                # With few columns dx nearly cancels: an absolute floor beside the relative bound.
                errors.append(error / max(size, 1e-2))
            row = {
                "op": op,
                "norm": norm,
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "error": max(errors),
                "repeats": all(torch.equal(got[n], again[n]) for n in got),
            }
            print(json.dumps(row))


main()
