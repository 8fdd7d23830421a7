"""`etude.fuse(model)`: Etude's operators inside models that other libraries built.

Called by people who train diffusers' `DiTTransformer2DModel`, `PixArtTransformer2DModel`,
`SD3Transformer2DModel` or `UNet2DConditionModel`, or the published DiT, in their own loop.
Parameters, state dict, class names, inputs and outputs stay what they were; forward and backward
agree with the unfused model within rounding. Modules are recognised by exact class (the published
DiT, which is no package, by the names and shapes of a block's parts), so a subclass with a forward
of its own is left alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor, nn

from etude import kernels


@dataclass
class Fused:
    """What `fuse` did: counts by class and operators brought in; what it left, and why."""

    swapped: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"{count} x {name}: {', '.join(operators)}"
            for (name, operators), count in self.swapped.items()
        ]
        lines += [
            f"{count} x {name} left as it is: {why}" for (name, why), count in self.left.items()
        ]
        return "\n".join(lines)


def fuse(model: nn.Module) -> Fused:
    """Give a model's blocks forwards that run on Etude's operators, in place.

    Returns what was swapped and what was left, to be printed. A model fused before is left alone.

    Errors: ValueError if nothing in the model is known.
    """
    done = Fused()
    for module in model.modules():
        if type(module).__module__.startswith("diffusers."):
            _fuse_diffusers(module, done)
        elif _is_dit_block(module):
            _fuse_dit_block(module, done)
    known = ("etude.external.diffusers_fused", __name__)
    if not done.swapped and not any(type(m).__module__ in known for m in model.modules()):
        raise ValueError(
            f"fuse: {type(model).__name__} has no block that is known: "
            "diffusers' DiT, PixArt, SD3 and U-Net models and the published DiT are"
        )
    return done


def _fuse_diffusers(module: nn.Module, done: Fused) -> None:
    from etude.external import diffusers_fused as fused

    name = type(module).__name__
    processor = getattr(module, "processor", None)
    for old, new in fused.PROCESSORS:
        if type(processor) is old:
            module.set_processor(new())
            done.swapped[name, ("attention",)] += 1
    if type(module) is fused.GELU and _fuse_linear_gelu(module.proj, module.approximate):
        module.__class__ = fused.ProjectedGELU
        done.swapped[name, ("bias_gelu",)] += 1
    for old, new, operators in fused.CLASSES:
        if type(module) is not old:
            continue
        why = fused.refusal(module)
        if why:
            done.left[name, why] += 1
        else:
            module.__class__ = new
            done.swapped[name, operators] += 1


class LinearGELU(nn.Linear):
    """A linear layer followed by GELU, with bias, activation and the bias' gradient in one pass.

    A Linear becomes one by its class, so that hooks on it (ZeRO-3's gathering, FSDP) still run.
    """

    approximate: str

    def forward(self, x: Tensor) -> Tensor:
        return kernels.bias_gelu(F.linear(x, self.weight), self.bias, approximate=self.approximate)


def _fuse_linear_gelu(linear: nn.Module | None, approximate: str) -> bool:
    if type(linear) is not nn.Linear or linear.bias is None:
        return False
    linear.__class__, linear.approximate = LinearGELU, approximate
    return True


class _FusedDiTBlock:
    """Mixed in before a published DiT block's own class, which it keeps the name of."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        vectors = self.adaLN_modulation(c).chunk(6, dim=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
        y = kernels.adaln_modulate(x, shift, scale, eps=self.norm1.eps)
        x, y = kernels.gate_residual_adaln(
            x, self.attn(y), gate, shift_mlp, scale_mlp, eps=self.norm2.eps
        )
        return kernels.gate_residual(x, self.mlp(y), gate_mlp)

    def __reduce__(self) -> tuple:
        mixin, own = type(self).__bases__
        return _new, (mixin, own), self.__dict__


class _FusedAttention:
    """Mixed in before timm's attention: the packed projection is read in place."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **more: object) -> Tensor:
        if attn_mask is not None or more:
            return super().forward(x, attn_mask=attn_mask, **more)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(kernels.attention_packed(qkv).flatten(2))

    __reduce__ = _FusedDiTBlock.__reduce__


@lru_cache
def _mixed(mixin: type, own: type) -> type:
    """A class made once per pair, so that copies and pickles of a fused module find it again."""
    return type(own.__name__, (mixin, own), {})


def _new(mixin: type, own: type) -> nn.Module:
    made = _mixed(mixin, own)
    return made.__new__(made)


def _fuse_dit_block(block: nn.Module, done: Fused) -> None:
    operators = ["adaln_modulate", "gate_residual_adaln", "gate_residual"]
    mlp = block.mlp
    idle = (getattr(mlp, name, None) for name in ("norm", "drop1", "drop2"))
    plain = all(_idle(module) for module in idle) and type(getattr(mlp, "act", None)) is nn.GELU
    if plain and _fuse_linear_gelu(getattr(mlp, "fc1", None), mlp.act.approximate):
        mlp.act = nn.Identity()
        operators.append("bias_gelu")
    if _is_timm_attention(block.attn):
        block.attn.__class__ = _mixed(_FusedAttention, type(block.attn))
        operators.append("attention")
    block.__class__ = _mixed(_FusedDiTBlock, type(block))
    done.swapped[type(block).__name__, tuple(operators)] += 1


def _is_timm_attention(attn: nn.Module) -> bool:
    layers = all(isinstance(getattr(attn, name, None), nn.Linear) for name in ("qkv", "proj"))
    others = ("q_norm", "k_norm", "norm", "attn_drop", "proj_drop")
    width = getattr(attn, "head_dim", None)
    usual = bool(width) and getattr(attn, "scale", None) == width**-0.5
    return layers and usual and all(_idle(getattr(attn, name, None)) for name in others)


def _idle(module: nn.Module | None) -> bool:
    """Whether a layer passes its input on: absent, Identity, or Dropout that drops nothing."""
    return isinstance(module, nn.Identity | None) or getattr(module, "p", 1.0) == 0.0


def _is_dit_block(module: nn.Module) -> bool:
    """The block of the published DiT: two plain LayerNorms, attn, mlp, a map to six vectors."""
    parts = dict(module.named_children())
    if set(parts) != {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}:
        return False
    norms, linear = (parts["norm1"], parts["norm2"]), parts["adaLN_modulation"]
    return (
        not isinstance(module, _FusedDiTBlock)
        and all(isinstance(n, nn.LayerNorm) and not n.elementwise_affine for n in norms)
        and isinstance(linear, nn.Sequential)
        and isinstance(linear[-1], nn.Linear)
        and linear[-1].out_features == 6 * norms[0].normalized_shape[-1]
    )
