"""Run by test_attention_triton.py with TRITON_INTERPRET=1: kernels against float64 autograd."""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from attention_cases import Case, make, operator, reference, run, worst_error

from etude.kernels import attention_config

CASES = (
    Case(1, 1, 1, 2, 8),
    Case(1, 17, 17, 2, 64, packed=True),
    Case(1, 64, 64, 2, 72),
    Case(1, 130, 130, 1, 72, packed=True),
    Case(1, 17, 130, 1, 8),
    Case(2, 9, 21, 2, 40),
    Case(2, 20, 20, 2, 7),
    Case(1, 16, 32, 1, 128),
    Case(1, 17, 9, 1, 160),
    Case(2, 30, 30, 2, 72, packed=True, norm=2, affine=2, rope=True),
    Case(2, 30, 30, 2, 8, norm=1, affine=1),
    Case(1, 17, 17, 2, 24, norm=2, rope=True),
    Case(1, 40, 40, 1, 72, packed=True, norm=1, affine=1, rope=True, bias=1),
    Case(3, 12, 30, 2, 24, lengths=(0, 13, 30)),
    Case(2, 30, 30, 2, 24, packed=True, lengths=(7, 30), norm=2, affine=2, rope=True),
    Case(3, 20, 0, 2, 72, offsets=(0, 5, 5, 40)),
    Case(2, 33, 0, 2, 24, offsets=(2, 9, 31), norm=2, affine=2),
    Case(3, 17, 33, 2, 24, bias=1),
    Case(2, 33, 17, 2, 24, bias=2, lengths=(5, 0)),
)


# float32 shows the mathematics of every case; in 16 bits, where values are rounded, every option
# appears in one of these: packed, keys in several tiles, odd and wide heads, both norms, rotation,
# lengths, offsets, bias. Those of REPEATED run twice.
CHOSEN = {torch.float16: (2, 3, 6, 8, 9, 12, 13, 15, 16, 18), torch.bfloat16: (2, 9)}
REPEATED = (9, 13, 15, 18)


def poison() -> None:
    """Memory that is allocated and not written shows as NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.Tensor.new_empty = poisoned


def values() -> None:
    """Every case in both forms: whole rows of scores, and tiles."""
    for index, case in enumerate(CASES):
        for longest in (256, 0):
            attention_config.SHORT_KEYS = attention_config.SHORT_QUERIES = longest
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                if dtype in CHOSEN and index not in CHOSEN[dtype]:
                    continue
                leaves, angles = make(case, dtype)
                got = run(operator, leaves, case, angles)
                want = run(reference, {n: t.double() for n, t in leaves.items()}, case, angles)
                error, name = worst_error(got, want)
                again = (
                    run(operator, leaves, case, angles)
                    if index in REPEATED and dtype == torch.float16
                    else got
                )
                row = {
                    "check": "values",
                    "case": {k: v for k, v in asdict(case).items() if v},
                    "form": "short" if longest else "long",
                    "dtype": str(dtype).removeprefix("torch."),
                    "error": error,
                    "name": name,
                    "repeats": all(torch.equal(got[n], again[n]) for n in got),
                }
                print(json.dumps(row))
    attention_config.SHORT_KEYS = attention_config.SHORT_QUERIES = 256


def empty() -> None:
    """No samples, no queries, no keys: shapes, zeros and -inf, forward and backward."""
    for case in (Case(0, 5, 5, 2, 8), Case(2, 0, 5, 2, 8), Case(2, 5, 0, 2, 8, norm=1, affine=1)):
        leaves, angles = make(case, torch.float32)
        got = run(operator, leaves, case, angles)
        zeros = all(not t.any() for n, t in got.items() if n != "lse")
        fine = zeros and bool((got["lse"] == -torch.inf).all())
        print(json.dumps({"check": "empty", "fine": fine}))


def registered() -> None:
    """Schemas and autograd keys of both operators."""
    for case in (
        Case(1, 6, 6, 2, 8, packed=True, norm=1, affine=1, rope=True),
        Case(2, 6, 7, 2, 8, lengths=(3, 7), bias=1),
    ):
        leaves, angles = make(case, torch.float32)
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32)
        weights = [leaves.get(n) for n in ("q_weight", "q_bias", "k_weight", "k_bias")]
        rope = (angles.cos(), angles.sin()) if case.rope else (None, None)
        tail = (leaves.get("bias"), *weights, case.norm, 1e-5, *rope)
        if case.packed:
            op, args = "triton_attention_packed", (leaves["qkv"], 0.3, lengths, *tail)
        else:
            op = "triton_attention"
            args = (*(leaves[n] for n in "qkv"), 0.3, lengths, None, *tail)
        said = torch.library.opcheck(
            getattr(torch.ops.etude, op).default,
            args,
            # Interpreted kernels take no fake tensors; test_attention_gpu.py runs all checks.
            test_utils=("test_schema", "test_autograd_registration"),
        )
        print(json.dumps({"check": "opcheck", "fine": set(said.values()) == {"SUCCESS"}}))


def gradients_asked_for() -> None:
    """Only what requires a gradient gets one; a sum's expanded gradient is taken; twice raises."""
    case = Case(1, 9, 9, 1, 8)
    leaves, angles = make(case, torch.float32)
    leaves["k"].requires_grad_()
    out, _ = operator(leaves, case, angles)
    (dk,) = torch.autograd.grad(out.sum(), leaves["k"], create_graph=True)
    exact = {n: t.detach().double().requires_grad_(n == "k") for n, t in leaves.items()}
    (want,) = torch.autograd.grad(reference(exact, case, angles)[0].sum(), exact["k"])
    fine = torch.allclose(dk.double(), want, atol=1e-6)
    try:
        torch.autograd.grad(dk.sum(), leaves["k"])
        fine = False
    except RuntimeError:
        pass
    print(json.dumps({"check": "gradients", "fine": fine}))


def sentences() -> None:
    """What the kernels lack raises a ValueError that says so."""
    plain, angles = make(Case(1, 4, 4, 1, 8), torch.float32)
    wide, _ = make(Case(1, 4, 4, 1, 257), torch.float32)
    weight = torch.ones(8)
    q, k, v = (plain[n] for n in "qkv")
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    none = (None,) * 7
    calls = (
        ("float64", (q.double(), k.double(), v.double(), 1.0, *none, 0, 1e-5, None, None)),
        ("257", (*(wide[n] for n in "qkv"), 1.0, *none, 0, 1e-5, None, None)),
        ("norm=3", (q, k, v, 1.0, *none, 3, 1e-5, None, None)),
        ("cos and sin", (q, k, v, 1.0, *none, 0, 1e-5, angles, None)),
        ("its weight", (q, k, v, 1.0, *none[:4], weight, None, None, 2, 1e-5, None, None)),
        ("norm=1 or", (q, k, v, 1.0, *none[:3], weight, *none[:3], 0, 1e-5, None, None)),
        (
            "key_offsets",
            (q, k[0], v[0], 1.0, None, offsets, *none[:5], 0, 1e-5, angles.cos(), angles.sin()),
        ),
        ("bias must", (q, k, v, 1.0, None, None, q, *none[:4], 0, 1e-5, None, None)),
    )
    for words, args in calls:
        try:
            torch.ops.etude.triton_attention(*args)
            fine = False
        except ValueError as error:
            fine = words in str(error)
        print(json.dumps({"check": f"sentence: {words}", "fine": fine}))


import_module("etude.kernels.attention_triton")  # registers the operators
poison()
values()
empty()
registered()
gradients_asked_for()
sentences()
