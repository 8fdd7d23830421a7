"""GroupNorm's Triton kernels on a real GPU: values, bits, sizes beyond 2^31; by `make gpu`."""

import pytest
import torch

from etude import kernels

pytestmark = pytest.mark.gpu
# Largest difference over the largest magnitude. 16-bit: one rounding of the output; float32: sums
# of up to 2^16 terms in another order.
BOUND = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [
    ((2, 1280, 8, 8), 32),
    ((2, 2560, 8, 8), 32),
    ((3, 1280, 16, 16), 32),
    ((2, 320, 64, 64), 32),
    ((1, 128, 256, 256), 32),
    ((2, 20, 33, 35), 5),
    ((2, 7, 1, 3), 7),
]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * 2 + 3).to("cuda", dtype)
    weight, bias = (torch.randn(shape[1], generator=g).to("cuda", dtype) for _ in range(2))
    return [x.contiguous(memory_format=torch.channels_last), weight, bias]


def run(function, given: list[torch.Tensor], groups: int, silu: bool) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    y = function(leaves[0], groups, *leaves[1:], 1e-5, silu)
    return [y.detach(), *torch.autograd.grad(y, leaves, y.detach().sin())]


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_triton_against_float64(shape, groups, silu, dtype, compiled) -> None:
    given = make(shape, dtype)
    torch._dynamo.reset()
    function = kernels.groupnorm_silu
    fast = torch.compile(function, fullgraph=True) if compiled else function
    with kernels.use_backend("triton"):
        got, again = run(fast, given, groups, silu), run(fast, given, groups, silu)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    with kernels.use_backend("reference"):
        want = run(function, [t.double() for t in given], groups, silu)
    # dy = sin(y) of the rounded y differs from that of the exact one: twice the bound.
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        assert float((a.double() - c).abs().max()) < 2 * BOUND[dtype] * float(c.abs().max())


def test_slices_along_the_channels() -> None:
    x, weight, bias = make((2, 640, 16, 16), torch.float32)
    view, weight, bias = x[:, 320:], weight[:320], bias[:320]
    dense = view.contiguous(memory_format=torch.channels_last)
    with kernels.use_backend("triton"):
        got = kernels.groupnorm_silu(view, 32, weight, bias)
        assert torch.equal(got, kernels.groupnorm_silu(dense, 32, weight, bias))


def test_contiguous_tensors_run_the_reference() -> None:
    x, weight, bias = make((2, 64, 16, 16), torch.float32)
    with kernels.use_backend("triton"):
        got = kernels.groupnorm_silu(x.contiguous(), 32, weight, bias)
    want = kernels.groupnorm_silu_reference(x.contiguous(), 32, weight, bias)
    assert torch.equal(got, want) and got.is_contiguous()


def test_more_than_two_to_the_31_elements() -> None:
    """The last picture of many equals itself alone. Needs 13 GB."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of free GPU memory")
    shape = (65, 128, 512, 512)  # 2^31 elements and one picture more
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").contiguous(
        memory_format=torch.channels_last
    )
    x.normal_()
    weight, bias = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16)
    with kernels.use_backend("triton"):
        y = kernels.groupnorm_silu(x, 32, weight, bias)
        assert torch.equal(y[-1:], kernels.groupnorm_silu(x[-1:], 32, weight, bias))


def test_nothing_waits_for_the_gpu() -> None:
    given = make((2, 64, 64, 64), torch.bfloat16)
    run(kernels.groupnorm_silu, given, 32, True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(kernels.groupnorm_silu, given, 32, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
