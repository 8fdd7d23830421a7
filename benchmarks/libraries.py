"""Kernels of other libraries as rivals of Etude's: Liger (Triton) and quack (CuTe, from Hopper on).

Called by the cases, which build their operator's computation around them. A factory imports its
library when it is called and raises ImportError with the reason where that cannot run here. Checked
against Liger 0.8.5 and quack 0.6.5. Beside torch's own attention, flash-attn and xformers are
rivals as well (cases/attention.py).

Left out, since no case computes the same: the RMSNorms of both (the blocks here take LayerNorm),
Liger's modulated RMSNorm, its GEGLU (a product of two inputs where `bias_gelu` adds a bias to one)
and its SwiGLU layers (no bias).
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

Unary = Callable[[Tensor], Tensor]
HOPPER = (9, 0)


def library(name: str, capability: tuple[int, int] = (0, 0)) -> ModuleType:
    """An imported module whose kernels run here. Errors: ImportError for every reason not to."""
    if not torch.cuda.is_available():
        raise ImportError(f"{name} needs a CUDA device")
    if torch.cuda.get_device_capability() < capability:
        raise ImportError(f"{name} needs compute capability {capability[0]}.{capability[1]}")
    try:
        return import_module(name)
    except Exception as error:  # a broken build may raise anything
        raise ImportError(f"{name}: {error}") from error


@lru_cache(maxsize=16)
def identity(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias (D,) of a norm without its own affine map, for libraries that require one."""
    return (
        torch.ones(width, dtype=dtype, device=device),
        torch.zeros(width, dtype=dtype, device=device),
    )


def liger_layernorm(eps: float = 1e-6) -> Unary:
    """LayerNorm over the last dimension, without an affine map."""
    norm = library("liger_kernel.transformers.functional").liger_layer_norm
    return lambda x: norm(x, *identity(x.shape[-1], x.dtype, x.device), eps)


def quack_layernorm(eps: float = 1e-6) -> Unary:
    """LayerNorm over the last dimension, without an affine map: the library's two functions.

    It has no autograd for them. Its weight is float32 and its backward always sums the gradient of
    the weight, which is dropped.
    """
    module = library("quack.rmsnorm", HOPPER)
    try:
        forward_of, backward_of = module.layernorm_fwd, module.layernorm_bwd
    except AttributeError as error:
        raise ImportError(f"quack: {error}") from error

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            y, rstd, mean = forward_of(x, weight, eps=eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
            x, weight, rstd, mean = ctx.saved_tensors
            return backward_of(x, weight, dy.contiguous(), rstd, mean, has_bias=False)[0], None

    def norm(x: Tensor) -> Tensor:
        weight, _ = identity(x.shape[-1], torch.float32, x.device)
        return LayerNorm.apply(x.reshape(-1, x.shape[-1]), weight).view_as(x)

    return norm


LAYERNORMS = {"Liger LayerNorm": liger_layernorm, "quack LayerNorm": quack_layernorm}


def liger_swiglu() -> Unary:
    """silu(gate) * value of x (rows, 2 D) with the gate first.

    By the function for both halves in one tensor where the installed version has it. The older one
    copies each half and writes the gradient over the copy; a single row's halves it would not copy
    and so overwrite x.
    """
    ops = library("liger_kernel.ops")
    fused = getattr(ops, "LigerFusedGateUpSiLUMulFunction", None)
    if fused is not None:
        return lambda x: fused.apply(x, False)
    apart = library("liger_kernel.transformers.functional").liger_swiglu
    return lambda x: apart(*x.chunk(2, -1))


def liger_groupnorm(groups: int, eps: float = 1e-5) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """GroupNorm of (x, weight, bias). It reads channels first: channels-last inputs are copied."""
    norm = library("liger_kernel.transformers.functional").liger_group_norm
    return lambda x, weight, bias: norm(x, weight, bias, x.shape[1], groups, eps)


def quack_linear_gelu() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """GELU (tanh) of a linear map, in the product's epilogue; by its heuristic, not its autotuner,
    which compiles for minutes."""
    act = library("quack.linear", HOPPER).linear_act_func
    return lambda x, weight, bias: act(x, weight, "gelu_tanh_approx", bias=bias, tuned=False)[1]


def quack_mlp() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Two linear maps with GELU (tanh) between, like `quack_linear_gelu`."""
    mlp = library("quack.mlp", HOPPER).mlp_func
    return lambda x, w1, b1, w2, b2: mlp(x, w1, w2, "gelu_tanh_approx", b1, b2, tuned=False)
