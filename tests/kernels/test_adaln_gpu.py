"""adaLN operators on a real GPU: packed modulation, bias, every width; run by `make gpu`."""

import pytest
import torch

from etude import kernels

pytestmark = pytest.mark.gpu
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def call(x, h, mod, bias, norm="layernorm"):
    return kernels.gate_residual_adaln(x, h, modulation=mod, bias=bias, norm=norm)


def run(function, tensors, **more):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, y = function(*leaves, **more)
    grads = torch.autograd.grad([out, y], leaves, [out.detach().sin(), y.detach().cos()])
    return [out.detach(), y.detach(), *grads]


def inputs(batch: int, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, rows, width), (batch, rows, width), (batch, 3 * width), (width,))
    return [torch.randn(*s, generator=g).to("cuda", dtype) for s in shapes]


@pytest.mark.parametrize("width", [16, 63, 72, 144, 199, 384, 768, 1024, 1152, 1536, 4096])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_packed_modulation_and_bias_against_float64(width: int, dtype: torch.dtype) -> None:
    data = inputs(3, 131, width, dtype)
    with kernels.use_backend("triton"):
        got, again = run(call, data), run(call, data)
    with kernels.use_backend("reference"):
        # The same upstream gradients: those of the rounded outputs.
        want = run(call, [t.double() for t in data])
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        assert float((a.double() - c).abs().max() / c.abs().max()) < 2 * BOUND[dtype]


def test_compiled_has_the_values_of_eager() -> None:
    data = inputs(2, 65, 1152, torch.bfloat16)
    torch._dynamo.reset()
    with kernels.use_backend("triton"):
        got = run(torch.compile(call, fullgraph=True), data, norm="rmsnorm")
        want = run(call, data, norm="rmsnorm")
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b.double()).abs().max()) <= 1e-2 * float(b.double().abs().max())


@pytest.mark.parametrize("shape", [(256, 256, 1152), (7, 1023, 384)], ids=str)
def test_many_programs_per_multiprocessor_and_a_ragged_last_chunk(shape) -> None:
    """Sums over rows against torch's, where a sample's rows are cut into unequal chunks."""
    x, h, mod, bias = (t.requires_grad_() for t in inputs(*shape, torch.bfloat16))
    with kernels.use_backend("triton"):
        out, y = call(x, h, mod, bias)
        ones = torch.ones_like(y)
        dmod, dbias = torch.autograd.grad([out, y], [mod, bias], [ones, torch.zeros_like(y)])
    gate = mod.detach().double()[:, : shape[2]]
    want = (h.detach().double() + bias.detach().double()).sum(1)
    assert float((dmod[:, : shape[2]].double() - want).abs().max() / want.abs().max()) < 5e-3
    want = gate.sum(0) * shape[1]
    assert float((dbias.double() - want).abs().max() / want.abs().max()) < 5e-3


def test_more_than_two_to_the_31_elements() -> None:
    """Addresses past 2^31: the last sample has the bits that it has alone."""
    batch, rows, width = 1900, 1024, 1152  # 2.24e9 elements, 4.5 GB a tensor
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    x = torch.randn(batch, rows, width, device="cuda", dtype=torch.bfloat16)
    mod = torch.randn(batch, 3 * width, device="cuda", dtype=torch.bfloat16)
    with kernels.use_backend("triton"):
        leaf, last = x.requires_grad_(), x[-1:].detach().clone().requires_grad_()
        whole = kernels.gate_residual_adaln(leaf, leaf, modulation=mod)
        alone = kernels.gate_residual_adaln(last, last, modulation=mod[-1:])
        assert all(torch.equal(a[-1:], b) for a, b in zip(whole, alone, strict=True))
        (dx,) = torch.autograd.grad(whole[1], leaf, whole[1].detach())
        (done,) = torch.autograd.grad(alone[1], last, alone[1].detach())
    assert torch.equal(dx[-1:], done)


def test_no_synchronisation() -> None:
    data = inputs(2, 65, 1152, torch.bfloat16)
    with kernels.use_backend("triton"):
        run(call, data)  # compile
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(call, data)
        finally:
            torch.cuda.set_sync_debug_mode("default")
