"""The CUDA twins on a real GPU; run by `make gpu`."""

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends.HAS_CUDA, reason="the CUDA kernels are not built"),
]
# Largest error over largest value: one rounding of the result, twice where `out` is rounded first.
BOUND = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def call(x: Tensor, h: Tensor, mod: Tensor, bias: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    return kernels.gate_residual_adaln(x, h, modulation=mod, bias=bias, norm=norm)


def run(function, tensors: list[Tensor], norm: str) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, y = function(*leaves, norm)
    grads = torch.autograd.grad([out, y], leaves, [out.detach().sin(), y.detach().cos()])
    return [out.detach(), y.detach(), *grads]


def inputs(B: int, N: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(D)
    shapes = ((B, N, D), (B, N, D), (B, 3 * D), (D,))
    return [torch.randn(*s, generator=g).to("cuda", dtype) for s in shapes]


@pytest.mark.parametrize("width", [8, 384, 768, 1024, 1152, 1536, 4096])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_against_float64_and_the_same_bits_again(width, norm, dtype) -> None:
    data = inputs(3, 131, width, dtype)
    with kernels.use_backend("cuda"):
        got = run(call, data, norm)
        again = run(call, data, norm)
    with kernels.use_backend("reference"):
        want = run(call, [t.double() for t in data], norm)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        assert float((a.double() - c).abs().max() / c.abs().max()) < BOUND[dtype]


@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual"])
def test_autocast_under_compile(op) -> None:
    x, h, mod, _ = inputs(4, 256, 1152, torch.float32)
    gate, shift, scale = mod.bfloat16().chunk(3, 1)

    def function(x: Tensor) -> Tensor:
        if op == "adaln_modulate":
            return kernels.adaln_modulate(x, shift, scale)
        return kernels.gate_residual(x, h.bfloat16(), gate)

    torch._dynamo.reset()
    with torch.autocast("cuda", torch.bfloat16), kernels.use_backend("cuda"):
        got = torch.compile(function, fullgraph=True)(x)
    with torch.autocast("cuda", torch.bfloat16), kernels.use_backend("reference"):
        want = function(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-5)


def test_addresses_beyond_two_to_the_31() -> None:
    """2.2e9 elements: the last rows are compared."""
    B, N, D = 1870, 1024, 1152
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    x = torch.empty(B, N, D, dtype=torch.bfloat16, device="cuda").normal_()
    mod = torch.randn(B, 2 * D, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    with kernels.use_backend("cuda"):
        y = kernels.adaln_modulate(x, modulation=mod)
        dy = x
        made = torch.ops.etude.cuda_adaln_modulate(x[-1:], *mod[-1:].chunk(2, 1), 1e-6, False, None)
        dx = torch.ops.etude.cuda_gate_residual_backward(dy, x, mod[:, :D], None)
    assert torch.equal(y[-1:], made[0])
    torch.testing.assert_close(dx[0][-1], x[-1] * mod[-1, :D], rtol=2**-7, atol=1e-5)


def optimizer_state(sizes: list[int], device: str) -> dict[str, list]:
    g = torch.Generator().manual_seed(1)
    params = [torch.randn(n, generator=g).to(device) for n in sizes]
    return {
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "emas": [[p.clone() for p in params] for _ in range(2)],
        "steps": [torch.zeros((), device=device) for _ in params],
        "copies": [p.bfloat16() for p in params],
    }


def step(state: dict[str, list], grads: list[Tensor], lr: Tensor, backend: str) -> None:
    lists = dict(state)
    with kernels.use_backend(backend):
        kernels.adamw_ema(
            lists.pop("params"), grads, **lists, lr=lr, betas=(0.9, 0.99), eps=1e-8,
            weight_decay=0.1, ema_decays=[lr * 0 + 0.9, lr * 0 + 0.999], found_inf=lr * 0,
        )  # fmt: skip


def flat(state: dict[str, list]) -> list[Tensor]:
    return [t for k, v in state.items() for t in (sum(v, []) if k == "emas" else v)]


def test_adamw_has_the_bits_of_the_cpu() -> None:
    """The C++ twin's bits: the same float64 operations, each rounded by itself.

    Only pow, in the bias corrections, may differ from the CPU's in its last place, which turns the
    rounding of a rare element.
    """
    sizes = [1, 7, 8193, 100_000, *[3] * 50]
    gpu, cpu = optimizer_state(sizes, "cuda"), optimizer_state(sizes, "cpu")
    for index in range(4):
        g = torch.Generator().manual_seed(index)
        grads = [torch.randn(n, generator=g) for n in sizes]
        lr = torch.tensor(1e-3, dtype=torch.float64)
        step(gpu, [t.cuda() for t in grads], lr.cuda(), "cuda")
        step(cpu, grads, lr, "cpp")
    for a, b in zip(flat(gpu), flat(cpu), strict=True):
        differ = float((a.cpu() != b).float().mean())
        assert differ < 1e-4
        torch.testing.assert_close(a.cpu(), b, rtol=2**-7 if a.dtype != b.dtype else 1e-6, atol=0)


def test_adamw_in_a_graph_follows_the_learning_rate_and_does_not_synchronise() -> None:
    sizes = [1000, 5, 70_000]
    captured, eager = optimizer_state(sizes, "cuda"), optimizer_state(sizes, "cuda")
    grads = [torch.randn(n, device="cuda") for n in sizes]
    lr = torch.full((), 1e-3, device="cuda", dtype=torch.float64)
    step(optimizer_state(sizes, "cuda"), grads, lr, "cuda")  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, grads, lr, "cuda")
    for rate in (1e-3, 5e-3):
        lr.fill_(rate)
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(eager, grads, lr, "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(flat(captured), flat(eager), strict=True):
        assert torch.equal(a, b)
