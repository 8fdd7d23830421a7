"""The activations' Triton kernels on a real GPU: values, bits, sizes beyond 2^31; by `make gpu`."""

import pytest
import torch

from etude import kernels

pytestmark = pytest.mark.gpu
# Largest difference over the largest magnitude. 16-bit: one rounding of the output; float32: sums
# of 300 terms in another order, and TF32 is off.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to("cuda", dtype) for s in shapes]


def run(function, given: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, y.detach().sin())]


def compare(function, given, bound: float, compiled: bool = False, plan=("triton", "")) -> None:
    """Twin against the reference in float64; two runs have the same bits. plan: name, operator."""
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True) if compiled else function
    with kernels.use_backend("triton"), kernels.use_backend(plan[0], op=plan[1]):
        got, again = run(fast, given), run(fast, given)
    with kernels.use_backend("reference"):
        want = run(function, [t.double() for t in given])
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        assert float((a.double() - c).abs().max()) < bound * max(1.0, float(c.abs().max()))


@pytest.mark.parametrize("width", [1, 63, 384, 1152, 4608])
@pytest.mark.parametrize("form", ["tanh", "none"])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_bias_gelu_and_swiglu(width, form, dtype, compiled) -> None:
    x, bias = tensors([(3, 100, 2 * width), (width,)], dtype)

    def gelu(x, bias):
        return kernels.bias_gelu(x[..., width:], bias, form)

    compare(gelu, [x, bias], 2 * BOUND[dtype], compiled)
    compare(kernels.swiglu, [x], 2 * BOUND[dtype], compiled)


@pytest.mark.parametrize("plan", ["split", "epilogue"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "inner"), [(1, 8, 8), (300, 72, 200), (513, 1152, 4608), (4096, 384, 1536)]
)
def test_mlp(plan, dtype, rows, width, inner) -> None:
    shapes = [(rows, width), (inner, width), (inner,), (width, inner), (width,)]
    given = tensors(shapes, torch.float32)
    given = [(t / max(1, t.shape[-1]) ** 0.5).to(dtype) if t.dim() == 2 else t for t in given]
    given = [t.to(dtype) for t in given]
    # Three roundings on the way, and gradients of up to 4096 rows of them.
    compare(kernels.mlp, given, 4 * BOUND[dtype], plan=(plan, "mlp"))
    compare(kernels.linear_gelu, given[:3], 4 * BOUND[dtype], plan=(plan, "linear_gelu"))


def test_the_library_s_epilogue() -> None:
    x, w, b = tensors([(256, 1152), (4608, 1152), (4608,)], torch.bfloat16)
    want = kernels.linear_gelu_reference(x.double(), w.double(), b.double())
    with torch.no_grad(), kernels.use_backend("library", op="linear_gelu"):
        got = kernels.linear_gelu(x, w, b)
    assert float((got.double() - want).abs().max() / want.abs().max()) < BOUND[torch.bfloat16]


def test_more_than_two_to_the_31_elements() -> None:
    """Rows beyond 2^31 elements equal the same rows alone. Needs 13 GB."""
    rows, width = 2**31 // 4608 + 200, 4608
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of free GPU memory")
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    bias = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    with kernels.use_backend("triton"):
        y = kernels.bias_gelu(x, bias)
        assert torch.equal(y[-100:], kernels.bias_gelu(x[-100:], bias))
        dx, _ = torch.ops.etude.triton_bias_gelu_backward(y, x, bias, True, False)
        tail = torch.ops.etude.triton_bias_gelu_backward(y[-100:], x[-100:], bias, True, False)[0]
    assert torch.equal(dx[-100:], tail)


def test_nothing_waits_for_the_gpu() -> None:
    x, bias = tensors([(64, 256), (128,)], torch.bfloat16)
    function = lambda x, b: kernels.bias_gelu(x[:, :128], b) * kernels.swiglu(x)  # noqa: E731
    run(function, [x, bias])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, [x, bias])
    finally:
        torch.cuda.set_sync_debug_mode("default")
