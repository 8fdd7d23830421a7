"""Shared by the attention tests of the Triton kernels: a float64 reference, cases, their errors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """B samples, Nq queries, Nk keys (unless offsets say), H heads of d; the operator's options."""

    B: int
    Nq: int
    Nk: int
    H: int
    d: int
    packed: bool = False
    lengths: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    bias: int = 0  # its batch, 0 without
    norm: int = 0
    affine: int = 0  # 1 weights, 2 weights and biases
    rope: bool = False


def prepare(x: Tensor, weight: Tensor | None, bias: Tensor | None, case: Case, angles: Tensor):
    """rope(norm(x)) of (..., N, H, d)."""
    if case.norm == 2:
        x = x - x.mean(-1, keepdim=True)
    if case.norm:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x if weight is None else x * weight
        x = x if bias is None else x + bias
    if case.rope:
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = (f(angles[: x.shape[-3], None].to(x.dtype)) for f in (torch.cos, torch.sin))
        x = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return x


def reference(leaves: dict[str, Tensor], case: Case, angles: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) sample by sample, with nothing shared with the kernels."""
    q, k, v = leaves["qkv"].unbind(2) if case.packed else (leaves[n] for n in "qkv")
    q = prepare(q, leaves.get("q_weight"), leaves.get("q_bias"), case, angles)
    k = prepare(k, leaves.get("k_weight"), leaves.get("k_bias"), case, angles)
    outs, lses = [], []
    for b in range(case.B):
        if case.offsets is not None:
            part = slice(case.offsets[b], case.offsets[b + 1])
            keys, values = k[part], v[part]
        else:
            part = slice(0, case.Nk if case.lengths is None else case.lengths[b])
            keys, values = k[b, part], v[b, part]
        scores = torch.einsum("nhd,mhd->hnm", q[b], keys) * SCALE
        if case.bias:
            scores = scores + leaves["bias"][b % case.bias][..., part]
        lses.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values))
    return torch.stack(outs), torch.stack(lses)


def operator(leaves: dict[str, Tensor], case: Case, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton operator on the same leaves."""
    device = angles.device
    counts = [
        None if t is None else torch.tensor(t, dtype=torch.int32, device=device)
        for t in (case.lengths, case.offsets)
    ]
    weights = [leaves.get(n) for n in ("q_weight", "q_bias", "k_weight", "k_bias")]
    rope = (angles.cos(), angles.sin()) if case.rope else (None, None)
    tail = (leaves.get("bias"), *weights, case.norm, 1e-5, *rope)
    if case.packed:
        op = torch.ops.etude.triton_attention_packed
        return op(leaves["qkv"], SCALE, counts[0], *tail)
    op = torch.ops.etude.triton_attention
    return op(*(leaves[n] for n in "qkv"), SCALE, *counts, *tail)


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """(leaves, angles); q, k and v are cut from one tensor, so none is dense."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    B, Nq, Nk, H, d = case.B, case.Nq, case.Nk, case.H, case.d
    if case.packed:
        leaves = {"qkv": draw(B, Nq, 3, H, d)}
    else:
        rows = (B, Nk) if case.offsets is None else (case.offsets[-1] + 2,)
        k, v = draw(*rows, H, 2, d).unbind(-2)
        leaves = {"q": draw(B, H, Nq, d).transpose(1, 2), "k": k, "v": v}
    if case.bias:
        leaves["bias"] = draw(case.bias, H, Nq, Nk)
    for n in ("q_weight", "k_weight")[: 2 * (case.affine > 0)]:
        leaves[n] = 1 + 0.3 * torch.randn(d, generator=g).to(device)
    for n in ("q_bias", "k_bias")[: 2 * (case.affine > 1)]:
        leaves[n] = 0.3 * torch.randn(d, generator=g).to(device)
    return leaves, (6 * torch.rand(max(Nq, Nk), max(1, d // 2), generator=g)).to(device)


def run(function: Callable, leaves: dict[str, Tensor], case: Case, angles: Tensor):
    """{out, lse, gradient of every leaf}; the loss weighs out and every finite lse."""
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
    out, lse = function(leaves, case, angles)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=g).to(out)
    finite = torch.where(lse.detach().isfinite(), torch.randn(lse.shape, generator=g).to(lse), 0)
    loss = (out * weight).sum() + torch.where(lse.isfinite(), lse * finite, 0).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest RMS error relative to the RMS of the reference, and whose it is."""
    errors = []
    for name, w in want.items():
        assert got[name].shape == w.shape, (name, got[name].shape, w.shape)
        g, there = got[name].double(), w.isfinite()
        if not torch.equal(g.isfinite(), there):
            return math.inf, name
        g, w = g[there], w[there]
        if g.numel():
            # With one key dq and dk cancel to zero: an absolute floor beside the relative bound.
            size = max(float(w.square().mean().sqrt()), 1e-2)
            errors.append((float((g - w).square().mean().sqrt()) / size, name))
    return max(errors, default=(0.0, ""))
