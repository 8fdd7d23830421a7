"""Run by test_activation_triton.py with TRITON_INTERPRET=1: every operator against float64."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from test_activation import OPS, exact, make, ours, run, wide

from etude import kernels
from etude.kernels import activation_triton


def report(name: str, dtype: torch.dtype, got: dict, again: dict, want: dict) -> None:
    errors = {}
    for key in want:
        size = float(want[key].square().mean().sqrt())
        error = float((got[key].double() - want[key]).square().mean().sqrt())
        errors[key] = error / max(size, 1e-2)
    row = {
        "op": name,
        "dtype": str(dtype).removeprefix("torch."),
        "errors": errors,
        "repeats": all(torch.equal(got[k], again[k]) for k in got),
    }
    print(json.dumps(row))


def mlp(op: str, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    if op == "linear_gelu":
        return kernels.linear_gelu(x, w1, b1)
    if op == "mlp":
        return kernels.mlp(x, w1, b1, w2, b2)
    if op == "exact linear_gelu":
        return kernels.linear_gelu_reference(x, w1, b1)
    return kernels.mlp_reference(x, w1, b1, w2, b2)


def main() -> None:
    for op in OPS:
        for shape in ((5, 63), (131, 3), (1, 1)):
            for dtype in (torch.float32, torch.float16):
                data = make(*shape, dtype)
                want = run(exact, op, wide(data))
                report(f"{op} {shape}", dtype, run(ours, op, data), run(ours, op, data), want)
    # One and several tiles, with remainders in all three dimensions.
    for rows, width, inner, out in ((5, 9, 7, 3), (140, 70, 133, 8)):
        g = torch.Generator().manual_seed(3)
        shapes = {"x": (rows, width), "w1": (inner, width), "b1": (inner,), "w2": (out, inner)}
        data = {
            k: (torch.randn(s, generator=g, dtype=torch.float64) / s[-1] ** 0.5).half()
            for k, s in (shapes | {"b2": (out,)}).items()
        }
        for op in ("linear_gelu", "mlp"):
            want = run(mlp, f"exact {op}", wide(data))
            name = f"{op} {(rows, width, inner, out)}"
            launched = len(launches)
            with kernels.use_backend("triton", verify=True):
                with kernels.use_backend("epilogue", op=op):
                    got = run(mlp, op, data)
                    again = run(mlp, op, data)
            assert len(launches) > launched, "the product kernel did not run"
            report(name, torch.float16, got, again, want)


launches = []
_product = activation_triton._product


def counted(*arguments) -> None:
    launches.append(1)
    _product(*arguments)


activation_triton._product = counted
main()
