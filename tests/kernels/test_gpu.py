"""Triton operators on a real GPU: values, bits, torch.compile; run by `make gpu`."""

import pytest
import torch

from etude import kernels

pytestmark = pytest.mark.gpu
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def call(x, h, mod, norm):
    gate, shift, scale = mod.chunk(3, 1)
    return kernels.gate_residual_adaln(x, h, gate, shift, scale, norm=norm)


def run(function, tensors, norm):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, y = function(*leaves, norm)
    grads = torch.autograd.grad([out, y], leaves, [out.detach().sin(), y.detach().cos()])
    return [out.detach(), y.detach(), *grads]


def inputs(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 130, width), (3, 130, width), (3, 3 * width))
    return [torch.randn(*s, generator=g).to("cuda", dtype) for s in shapes]


@pytest.mark.parametrize("width", [16, 63, 199, 768, 1152])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_triton_against_float64(width, norm, dtype, compiled) -> None:
    data = inputs(width, dtype)
    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True) if compiled else call
    with kernels.use_backend("triton"):
        got = run(function, data, norm)
        again = run(function, data, norm)
    with kernels.use_backend("reference"):
        want = run(call, [t.double() for t in data], norm)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        assert float((a.double() - c).abs().max() / c.abs().max()) < 2 * BOUND[dtype]


def test_adamw_ema_does_not_synchronise() -> None:
    params = [torch.randn(1000, device="cuda")]
    state = [[torch.zeros_like(params[0])] for _ in range(4)]
    one = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.adamw_ema(
            params, state[0], state[1], state[2], [state[3]], [torch.zeros((), device="cuda")],
            lr=one * 1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, ema_decays=[one * 0.9],
            grad_scale=one, found_inf=one * 0,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
