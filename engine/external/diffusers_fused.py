"""Blocks of the diffusers library whose element-wise work runs on Etude's operators.

Called by `etude.models.fuse`. Each class has the name, the parameters and the results of the class
it derives from, so a model keeps its state dict, its hooks and its class names (which FSDP and
accelerate wrap by); a module is fused by giving it the derived class, which survives deepcopy and
pickling where a replaced `forward` would not. What a derived class does not cover (GLIGEN, chunked
feed-forward, attention masks) it hands to its base class, call by call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention, attention_processor, normalization, resnet
from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_sd3
from torch import Tensor, nn

from etude import kernels


def _is_plain(norm: nn.Module | None) -> bool:
    """A LayerNorm without weight and bias: the only one that the operators compute."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None


def _chunks(linear: nn.Module, embedding: Tensor, count: int) -> tuple[Tensor, ...]:
    return linear(F.silu(embedding)).chunk(count, dim=1)


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """Normalisation and modulation in one pass."""

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = _chunks(self.linear, emb, 6)
        return kernels.adaln_modulate(x, shift, scale, eps=self.norm.eps), *others


class AdaLayerNormContinuous(normalization.AdaLayerNormContinuous):
    """Normalisation and modulation in one pass; the chunks are scale, then shift."""

    def forward(self, x, conditioning_embedding):
        embedding = F.silu(conditioning_embedding).to(x.dtype)
        scale, shift = self.linear(embedding).chunk(2, dim=1)
        return kernels.adaln_modulate(x, shift, scale, eps=self.norm.eps)


class SD35AdaLayerNormZeroX(normalization.SD35AdaLayerNormZeroX):
    """Two modulated copies of one normalised tensor."""

    def forward(self, hidden_states, emb=None):
        chunks = _chunks(self.linear, emb, 9)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift_2, scale_2, gate_2 = chunks
        first = kernels.adaln_modulate(hidden_states, shift, scale, eps=self.norm.eps)
        second = kernels.adaln_modulate(hidden_states, shift_2, scale_2, eps=self.norm.eps)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate_2


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """DiT's block (ada_norm_zero) and PixArt's (ada_norm_single)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        x = hidden_states
        if x.dim() != 3 or self._chunk_size is not None or cross_attention_kwargs:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
                timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        single = self.norm_type == "ada_norm_single"
        if single:
            vectors = self.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors.to(x.dtype).unbind(1)
            y = kernels.adaln_modulate(x, shift, scale, eps=self.norm1.eps)
        else:
            y, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(
                x, timestep, class_labels, hidden_dtype=x.dtype
            )
        own = encoder_hidden_states if self.only_cross_attention else None
        branch = self.attn1(y, encoder_hidden_states=own, attention_mask=attention_mask)
        last = self.norm2 if single else self.norm3
        if self.attn2 is None:
            x, y = kernels.gate_residual_adaln(x, branch, gate, shift_mlp, scale_mlp, eps=last.eps)
        else:
            x = kernels.gate_residual(x, branch, gate)
            x = x + self.attn2(
                x if single else self.norm2(x),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
            )
            y = kernels.adaln_modulate(x, shift_mlp, scale_mlp, eps=last.eps)
        return kernels.gate_residual(x, self.ff(y), gate_mlp)


class JointTransformerBlock(attention.JointTransformerBlock):
    """mmDiT's block: a picture stream and a text stream (Stable Diffusion 3 and 3.5)."""

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        if self._chunk_size is not None:
            return super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
        more = joint_attention_kwargs or {}
        x, c = hidden_states, encoder_hidden_states
        y, gate, *mlp = self.norm1(x, emb=temb)
        if self.context_pre_only:
            c_y, c_gate, c_mlp = self.norm1_context(c, temb), None, []
        else:
            c_y, c_gate, *c_mlp = self.norm1_context(c, emb=temb)
        branch, c_branch = self.attn(hidden_states=y, encoder_hidden_states=c_y, **more)
        if self.use_dual_attention:
            *mlp, second, second_gate = mlp
            x = kernels.gate_residual(x, branch, gate)
            branch, gate = self.attn2(hidden_states=second, **more), second_gate
        x = _feed_forward(self.norm2, self.ff, x, branch, gate, *mlp)
        if self.context_pre_only:
            return None, x
        return _feed_forward(self.norm2_context, self.ff_context, c, c_branch, c_gate, *c_mlp), x


class SD3SingleTransformerBlock(transformer_sd3.SD3SingleTransformerBlock):
    """The block of one stream, as ControlNets of Stable Diffusion 3 use it."""

    def forward(self, hidden_states, temb):
        y, gate, *mlp = self.norm1(hidden_states, emb=temb)
        branch = self.attn(hidden_states=y, encoder_hidden_states=None)
        return _feed_forward(self.norm2, self.ff, hidden_states, branch, gate, *mlp)


def _feed_forward(
    norm: nn.LayerNorm, ff: nn.Module, x: Tensor, branch: Tensor, gate: Tensor,
    shift: Tensor, scale: Tensor, gate_mlp: Tensor,
) -> Tensor:  # fmt: skip
    """The attention branch is added, and the feed-forward branch computed and added."""
    x, y = kernels.gate_residual_adaln(x, branch, gate, shift, scale, eps=norm.eps)
    return kernels.gate_residual(x, ff(y), gate_mlp)


class ProjectedGELU(GELU):
    """The activation of a feed-forward layer whose projection already applies it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(hidden_states)


class ResnetBlock2D(resnet.ResnetBlock2D):
    """A residual block whose GroupNorm and SiLU run together."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        if args or kwargs.get("scale") is not None:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, _norm_silu(self.norm1, input_tensor)
        resample = self.upsample or self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
            h = h + temb[:, :, None, None]
        h = self.conv2(self.dropout(_norm_silu(self.norm2, h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return (x + h) / self.output_scale_factor


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return kernels.groupnorm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)


class FusedAttnProcessor(attention_processor.AttnProcessor2_0):
    """Self- and cross-attention without transposed copies; masked calls go to the base class."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None,
        *args, **kwargs,
    ):  # fmt: skip
        x = hidden_states
        special = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attention_mask)
        if x.dim() != 3 or any(s is not None for s in special) or attn.norm_cross:
            return super().__call__(
                attn, x, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        source = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            project(t).unflatten(-1, (attn.heads, -1))
            for project, t in ((attn.to_q, x), (attn.to_k, source), (attn.to_v, source))
        )
        y = attn.to_out[1](attn.to_out[0](kernels.dot_product_attention(q, k, v).flatten(2)))
        if attn.residual_connection:
            y = y + x
        return y / attn.rescale_output_factor


class FusedJointAttnProcessor(attention_processor.JointAttnProcessor2_0):
    """Attention over a picture stream and a text stream, in diffusers' order: picture first."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs
    ):
        x, c = hidden_states, encoder_hidden_states

        def heads(t: Tensor, projection: nn.Module, norm: nn.Module | None) -> Tensor:
            t = projection(t).unflatten(-1, (attn.heads, -1))
            return t if norm is None else norm(t)

        q, k = heads(x, attn.to_q, attn.norm_q), heads(x, attn.to_k, attn.norm_k)
        v = heads(x, attn.to_v, None)
        if c is not None:
            q = torch.cat((q, heads(c, attn.add_q_proj, attn.norm_added_q)), dim=1)
            k = torch.cat((k, heads(c, attn.add_k_proj, attn.norm_added_k)), dim=1)
            v = torch.cat((v, heads(c, attn.add_v_proj, None)), dim=1)
        y = kernels.dot_product_attention(q, k, v).flatten(2)
        y, c_y = y[:, : x.shape[1]], y[:, x.shape[1] :]
        y = attn.to_out[1](attn.to_out[0](y))
        if c is None:
            return y
        return y, c_y if attn.context_pre_only else attn.to_add_out(c_y)


def refusal(module: nn.Module) -> str:
    """Why a module of a known class keeps its own forward; empty if it can be fused."""
    if isinstance(module, attention.BasicTransformerBlock):
        if module.norm_type not in ("ada_norm_zero", "ada_norm_single"):
            return f"norm_type={module.norm_type} has no modulation"
        norms = [module.norm2 if module.norm_type == "ada_norm_single" else module.norm3]
        norms += [module.norm1] * (module.norm_type == "ada_norm_single")
        if not all(_is_plain(norm) for norm in norms):
            return "its LayerNorm has a weight of its own"
        if module.pos_embed is not None:
            return "it adds positions inside the block"
    elif isinstance(module, resnet.ResnetBlock2D):
        if module.time_embedding_norm != "default" or not isinstance(module.nonlinearity, nn.SiLU):
            return f"time_embedding_norm={module.time_embedding_norm}, {module.nonlinearity}"
    elif isinstance(module, _ADAPTIVE) and not _is_plain(module.norm):
        return "its norm is not a LayerNorm without weight"
    return ""


_ADAPTIVE = (
    normalization.AdaLayerNormZero,
    normalization.AdaLayerNormContinuous,
    normalization.SD35AdaLayerNormZeroX,
)
_NORM = ("adaln_modulate",)
_GATED = ("adaln_modulate", "gate_residual", "gate_residual_adaln")
# The class that is fused, the class it becomes, and the operators that this brings in.
CLASSES: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (normalization.AdaLayerNormZero, AdaLayerNormZero, _NORM),
    (normalization.AdaLayerNormContinuous, AdaLayerNormContinuous, _NORM),
    (normalization.SD35AdaLayerNormZeroX, SD35AdaLayerNormZeroX, _NORM),
    (attention.BasicTransformerBlock, BasicTransformerBlock, _GATED),
    (attention.JointTransformerBlock, JointTransformerBlock, _GATED),
    (transformer_sd3.SD3SingleTransformerBlock, SD3SingleTransformerBlock, _GATED),
    (resnet.ResnetBlock2D, ResnetBlock2D, ("groupnorm_silu",)),
)
PROCESSORS: tuple[tuple[type, type], ...] = (
    (attention_processor.AttnProcessor2_0, FusedAttnProcessor),
    (attention_processor.JointAttnProcessor2_0, FusedJointAttnProcessor),
)
