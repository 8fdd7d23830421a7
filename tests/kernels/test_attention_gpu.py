"""The Triton attention operators on a real GPU: values, bits, torch.compile, large tensors."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from attention_cases import Case, make, operator, reference, run, worst_error

pytestmark = pytest.mark.gpu
# As in test_attention_triton.py; float16 and bfloat16 products are exact, their sums float32.
BOUND = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = {
    "DiT-XL, 256 pixels": Case(3, 256, 256, 16, 72, packed=True),
    "DiT-B, 256 pixels": Case(3, 256, 256, 12, 64, packed=True),
    "DiT-XL, 512 pixels": Case(2, 1024, 1024, 16, 72, packed=True),
    "128 columns": Case(2, 320, 320, 8, 128, packed=True),
    "one token": Case(2, 1, 1, 2, 64),
    "odd": Case(2, 199, 63, 3, 40),
    "odd head": Case(1, 130, 130, 2, 7),
    "256 columns": Case(1, 70, 70, 2, 256),
    "norm and rotation": Case(3, 256, 256, 4, 72, packed=True, norm=1, affine=1, rope=True),
    "norm and rotation, long": Case(2, 600, 600, 4, 72, norm=2, affine=2, rope=True),
    "text of many lengths": Case(5, 256, 120, 4, 72, lengths=(0, 1, 77, 119, 120)),
    "text, long": Case(3, 1024, 300, 4, 72, lengths=(5, 300, 129)),
    "packed text": Case(4, 256, 0, 4, 72, offsets=(0, 40, 40, 117, 300), norm=1, affine=1),
    "packed text, long": Case(3, 1024, 0, 4, 72, offsets=(3, 40, 700, 1200)),
    "bias of all": Case(7, 256, 256, 4, 64, bias=1),
    "bias of each": Case(2, 199, 120, 4, 72, bias=2, lengths=(3, 120)),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    import_module("etude.kernels.attention_triton")


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    leaves, angles = make(case, dtype, "cuda")
    got, again = (run(operator, leaves, case, angles) for _ in range(2))
    want = run(reference, {n: t.double() for n, t in leaves.items()}, case, angles.double())
    error, where = worst_error(got, want)
    assert error < BOUND[dtype], where
    assert all(torch.equal(got[n], again[n]) for n in got)


@pytest.mark.parametrize("name", ["DiT-XL, 256 pixels", "norm and rotation, long", "bias of all"])
def test_compiled_without_a_break(name: str) -> None:
    case = CASES[name]
    leaves, angles = make(case, torch.bfloat16, "cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: operator(a[0], case, a[1]), fullgraph=True)
    got = run(lambda x, _, a: compiled(x, a), leaves, case, angles)
    want = run(operator, leaves, case, angles)
    error, where = worst_error(got, {n: t.double() for n, t in want.items()})
    assert error < 1e-3, where


def test_opcheck() -> None:
    qkv = torch.randn(2, 20, 3, 2, 24, device="cuda", dtype=torch.float16, requires_grad=True)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(2))
    none = (None,) * 4
    tail = (None, *none, 1, 1e-6, None, None)
    torch.library.opcheck(torch.ops.etude.triton_attention_packed, (qkv, 0.2, None, *tail))
    torch.library.opcheck(torch.ops.etude.triton_attention, (q, k, v, 0.2, None, None, *tail))


def test_does_not_synchronise() -> None:
    case = CASES["packed text, long"]
    leaves, angles = make(case, torch.bfloat16, "cuda")
    offsets = torch.tensor(case.offsets, dtype=torch.int32, device="cuda")
    q, k, v = (leaves[n].requires_grad_() for n in "qkv")
    args = (q, k, v, 0.2, None, offsets, *(None,) * 5, 0, 1e-6, None, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = torch.ops.etude.triton_attention(*args)
        torch.autograd.grad(out.sum(), (q, k, v))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_numbers() -> None:
    """The last sample of 2.2e9 numbers has the bits it has alone, forward and backward."""
    qkv = torch.randn(2500, 256, 3, 16, 72, device="cuda", dtype=torch.bfloat16)
    none = (None,) * 6

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        out, _ = torch.ops.etude.triton_attention_packed(x, 0.1, *none, 0, 0.0, None, None)
        (dx,) = torch.autograd.grad(out, x, torch.ones_like(out) * out.detach())
        return out.detach()[-1], dx[-1]

    for whole, alone in zip(both(qkv), both(qkv[-1:]), strict=True):
        assert torch.equal(whole, alone)
