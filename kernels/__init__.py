"""Etude's operators: each with one plain torch reference, and C++, Triton and CUDA twins.

Light on purpose: nothing is registered, compiled or loaded before an operator is first used, and
importing this package never raises (other libraries probe for a package of this folder's name).
Called by the models, the diffusion objectives and samplers, the optimizer, the metrics and their
extractors, `etude.fuse`, and by `etude kernels` and `etude doctor` (`status`, `attention_status`).
"""

from typing import Any

__version__ = "0.1.0"

_OWNERS = {
    "adaln_modulate": "adaln",
    "adaln_modulate_reference": "adaln",
    "gate_residual": "adaln",
    "gate_residual_adaln": "adaln",
    "gate_residual_adaln_reference": "adaln",
    "gate_residual_reference": "adaln",
    "adaln_single": "modulation",
    "flatten_modulation": "modulation",
    "modulation_gemm": "modulation",
    "modulation_gemm_reference": "modulation",
    "modulation_table": "modulation",
    "QKNorm": "attention_backends",
    "attention_packed": "attention",
    "attention_reference": "attention",
    "attention_status": "attention_backends",
    "dot_product_attention": "attention",
    "joint_attention": "attention",
    "joint_projection": "attention",
    "relative_position_bias": "attention",
    "rope_2d": "attention",
    "bias_gelu": "activation",
    "bias_gelu_reference": "activation",
    "linear_gelu": "activation",
    "linear_gelu_reference": "activation",
    "mlp": "activation",
    "mlp_reference": "activation",
    "swiglu": "activation",
    "swiglu_reference": "activation",
    "groupnorm_silu": "groupnorm",
    "groupnorm_silu_reference": "groupnorm",
    "adamw_ema": "optimizer",
    "adamw_ema_reference": "optimizer",
    "diffuse": "noising",
    "diffuse_reference": "noising",
    "diffusion_loss": "noising",
    "diffusion_loss_reference": "noising",
    "noise_like": "noising",
    "noise_like_reference": "noising",
    "solver_coefficients": "solver",
    "solver_step": "solver",
    "solver_step_reference": "solver",
    "to_uint8": "solver",
    "to_uint8_reference": "solver",
    "resize": "resizing",
    "resize_reference": "resizing",
    "moments": "statistics",
    "moments_reference": "statistics",
    "knn_radii": "knn",
    "membership_counts": "knn",
    "nearest_neighbours": "knn",
    "nearest_neighbours_reference": "knn",
    "neighbour_pairs": "knn",
    "neighbour_pairs_reference": "knn",
    "Fp8Linear": "fp8",
    "adaln_modulate_fp8": "fp8",
    "adaln_modulate_fp8_reference": "fp8",
    "linear_fp8": "fp8",
    "linear_fp8_reference": "fp8",
    "announce": "backends",
    "status": "backends",
    "use_backend": "backends",
}
__all__ = sorted(_OWNERS)


def __getattr__(name: str) -> Any:
    """Load an operator's file when the operator is first named."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_OWNERS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
