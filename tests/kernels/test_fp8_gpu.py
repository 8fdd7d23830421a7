"""8-bit rows on a real GPU: the cast, and torch._scaled_mm; run by `make gpu`."""

import pytest
import torch

from etude import kernels
from etude.kernels import fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="needs compute capability 9.0",
    ),
]


def inputs(shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    B, N, D = shape
    x, mod = torch.randn(B, N, D, generator=g), torch.randn(B, 2 * D, generator=g)
    return {"x": x.to("cuda", torch.bfloat16), "modulation": mod.to("cuda", torch.bfloat16)}


@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 7, 199), (2, 65, 1152), (1, 1, 4096)], ids=str)
def test_kernel_against_the_reference(shape: tuple[int, int, int]) -> None:
    data = {k: v.requires_grad_() for k, v in inputs(shape).items()}
    with kernels.use_backend("triton"):
        got = kernels.adaln_modulate_fp8(**data)
    with kernels.use_backend("reference"):
        want = kernels.adaln_modulate_fp8(**data)
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0)
    # Equal but where float32 puts a value on the other side of the middle of a step.
    same = got.values.float() == want.values.float()
    assert float(same.float().mean()) > 0.999
    error = (got.values.float() - want.values.float()).abs()
    assert bool((error <= 0.126 * want.values.float().abs() + 0.002).all())
    g = torch.randn_like(got.high)
    leaves = list(data.values())
    for a, b in zip(
        torch.autograd.grad(got.high, leaves, g),
        torch.autograd.grad(want.high, leaves, g),
        strict=True,
    ):
        assert float((a - b).float().norm() / b.float().norm()) < 1e-2


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_scaled_product_against_the_dequantised_one(rows: int) -> None:
    g = torch.Generator().manual_seed(1)
    y, weight, bias = (
        torch.randn(*s, generator=g).to("cuda", torch.bfloat16)
        for s in ((2, rows, 1152), (3456, 1152), (3456,))
    )
    quantised = fp8.Rows8(*fp8.quantise_rows(y), None)
    got = kernels.linear_fp8(quantised, weight, bias)
    want = kernels.linear_fp8_reference(quantised.values, quantised.scale, weight, bias)
    # One rounding to bfloat16 and the tensor core's shorter accumulator.
    assert float((got.float() - want).norm() / want.norm()) < 5e-3
