"""Row-wise scaled 8-bit floats: adaLN that emits them, and the linear layer that takes them.

Opt-in: no recipe uses it. For a row y of the normalised, modulated x (`adaln.py`), (B, N, D):

    s = max(|y|) / 448        448 is the largest float8_e4m3fn; 1 where max(|y|) is below 1e-35
    values = round(y / s)     float8_e4m3fn, 3 bits of mantissa: a relative error of at most 2^-4
    out = (values @ w8^T) * s * t^T + bias       w8, t: the same of the weight's rows

(per-token and per-channel scaling, as in Micikevicius et al., "FP8 Formats for Deep Learning",
2022, and the row-wise form of torch._scaled_mm.) A row of its own scale has no history to keep and
no outlier of another token to suffer from.

Only the forward product is in 8 bits. The backward pass is that of an ordinary linear layer, in the
dtype of y, from y itself (kept in that dtype beside its values) and the unrounded weight: gradients
span more binades than e4m3 has, and are two thirds of the work, so what fp8 saves here is at most a
sixth of a layer's product time; rounding of y and w acts as noise that the gradient does not see
(a straight-through estimate). The kernel writes y and its values in one pass, 3 bytes per element
where a separate cast would read 2 and write 1 more; without gradients y is not written at all.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import adaln, backends
from .catalogue import Operator

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 1e-35  # rows below it are rounded to zeros: their scale has no reciprocal in float32


class Rows8(NamedTuple):
    """Rows in 8 bits: high ~ values * scale."""

    values: Tensor  # (..., D) float8_e4m3fn
    scale: Tensor  # (...) float32, one per row
    high: Tensor | None  # (..., D), what was rounded, where a backward pass will want it


def quantise_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) of the rows of t: (..., D), any floating dtype; differentiable in neither."""
    t = t.detach().float()
    largest = t.abs().amax(-1) if t.shape[-1] else t.new_zeros(t.shape[:-1])
    scale = torch.where(largest > SMALLEST, largest / LARGEST, 1.0)
    # Division may round past the largest value, which the cast would turn into NaN.
    scaled = (t / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    return scaled.to(E4M3), scale


def dequantise_rows(values: Tensor, scale: Tensor) -> Tensor:
    """float32 values * scale."""
    return values.float() * scale.unsqueeze(-1)


def adaln_modulate_fp8_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "layernorm",
    out_dtype: torch.dtype | None = None,
) -> Rows8:
    """`adaln_modulate_fp8` in plain torch; `high` is differentiable."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = adaln.adaln_modulate_reference(wide, shift, scale, eps=eps, norm=norm)
    return Rows8(*quantise_rows(y), y.to(out_dtype or x.dtype))


def adaln_modulate_fp8(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    modulation: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layernorm",
) -> Rows8:
    """norm(x) * (1 + scale) + shift as rows of float8_e4m3fn with a float32 scale each.

    Arguments and errors as in `adaln_modulate`. Returns values (B, N, D), scale (B, N) and, where
    gradients are on and an argument requires one, high: (B, N, D), what `adaln_modulate` returns,
    through which gradients flow; else None.
    """
    op = "adaln_modulate_fp8"
    adaln.check(op, norm, x, None, {"shift": shift, "scale": scale}, modulation, None)
    if modulation is not None:
        shift, scale = modulation.chunk(2, 1)
    to = adaln.output_dtype(x)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, shift, scale))
    dtypes = (x.dtype, shift.dtype, to or x.dtype)
    backend = backends.pick(op, x.device.type, *dtypes, twins=("triton",))
    # Triton has no float8_e4m3fn before compute capability 8.9; its interpreter rounds it wrongly.
    if backend == "triton" and not backends.interpreting():
        if torch.cuda.get_device_capability(x.device) >= (8, 9):
            from . import fp8_triton  # noqa: F401  (registers the operator on first use)

            call = torch.ops.etude.triton_adaln_modulate_fp8
            y, values, row_scale, _, _ = call(x, shift, scale, eps, norm == "rmsnorm", to, wanted)
            return Rows8(values, row_scale, y if wanted else None)
    made = adaln_modulate_fp8_reference(x, shift, scale, eps=eps, norm=norm, out_dtype=to)
    return made if wanted else made._replace(high=None)


def linear_fp8_reference(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(values * scale) @ (w8 * t)^T + bias from the dequantised rows, in float32."""
    out = dequantise_rows(values, scale) @ dequantise_rows(*quantise_rows(weight)).t()
    return (out if bias is None else out + bias.float()).to(out_dtype)


def _scaled(
    values: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """The product on the tensor cores; torch takes D and K in multiples of 16, and bfloat16 out."""
    flat, rows = values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1)
    w8, columns = quantise_rows(weight)
    out = torch._scaled_mm(
        flat,
        w8.t(),
        scale_a=rows,
        scale_b=columns.unsqueeze(0),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )
    return out.view(*values.shape[:-1], -1).to(out_dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, high, values, scale, weight, bias, out_dtype):
        ctx.save_for_backward(high, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        even = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
        fast = values.is_cuda and even and values.numel() > 0 and weight.numel() > 0
        if fast and torch.cuda.get_device_capability(values.device) >= (9, 0):
            return _scaled(values, scale, weight, bias, out_dtype)
        return linear_fp8_reference(values, scale, weight, bias, out_dtype=out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        high, weight = ctx.saved_tensors
        dhigh = dweight = dbias = None
        if high is not None and ctx.needs_input_grad[0]:
            dhigh = (dout.to(high.dtype) @ weight.to(high.dtype)).to(high.dtype)
        if ctx.needs_input_grad[3]:
            flat = dout.reshape(-1, dout.shape[-1]).to(high.dtype)
            dweight = (flat.t() @ high.reshape(-1, high.shape[-1])).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            dbias = dout.sum(tuple(range(dout.dim() - 1)), dtype=torch.float32).to(ctx.bias_dtype)
        return dhigh, None, None, dweight, dbias, None


def linear_fp8(
    rows: Rows8, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """rows @ weight^T + bias with both factors in 8 bits, accumulated in float32.

    rows: values (..., D), from `adaln_modulate_fp8` or `quantise_rows`; weight: (K, D); bias: (K,).
    Returns (..., K) of out_dtype (default: that of `rows.high`, else bfloat16). The weight is
    quantised in every call: it changes in every step of training. On CUDA from compute capability
    9.0 this is torch._scaled_mm (D and K multiples of 16), rounded to bfloat16; elsewhere a float32
    product of the dequantised factors, which saves nothing. Gradients as in the docstring
    of this file. Errors: ValueError if shapes do not fit, or if the weight requires a gradient and
    `rows.high` is absent.
    """
    values, scale, high = rows
    if values.dtype != E4M3 or tuple(scale.shape) != tuple(values.shape[:-1]):
        raise ValueError(
            f"linear_fp8: rows are {tuple(values.shape)} {values.dtype} with scales "
            f"{tuple(scale.shape)}: make them with adaln_modulate_fp8 or quantise_rows"
        )
    if weight.dim() != 2 or weight.shape[1] != values.shape[-1]:
        raise ValueError(
            f"linear_fp8: weight must be (K, {values.shape[-1]}), got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"linear_fp8: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if high is None and torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("linear_fp8: a gradient of the weight needs rows.high, which is absent")
    out_dtype = out_dtype or (torch.bfloat16 if high is None else high.dtype)
    return _Linear.apply(high, values, scale, weight, bias, out_dtype)


class Fp8Linear(nn.Linear):
    """nn.Linear on `Rows8`, by `linear_fp8`; takes plain tensors (..., D) too and rounds them."""

    def forward(self, rows: Rows8 | Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            rows = Rows8(*quantise_rows(rows), rows)
        return linear_fp8(rows, self.weight, self.bias)


OPERATORS = (
    Operator("adaln_modulate_fp8", "adaln_modulate into 8-bit rows with scales", ("triton",)),
    Operator(
        "linear_fp8",
        "a linear layer on 8-bit rows, ordinary gradients",
        (),
        dtypes="float8_e4m3fn rows in, float32 or bfloat16 out",
    ),
)
