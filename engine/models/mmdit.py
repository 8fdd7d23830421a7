"""mmDiT, the two-stream transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024).

Built by name from a recipe's model section; called by training and sampling. Picture and text are
streams of tokens with weights of their own that meet in one attention. For each stream, with
c = time + pooled text + control,

    x <- x + gate_1 * W Attention(LN(x) (1 + scale_1) + shift_1, of both streams)
    x <- x + gate_2 * MLP(LN(x) (1 + scale_2) + shift_2)

where the six vectors of a stream are a linear map of SiLU(c) that starts at zero. The last block
keeps no text. Stable Diffusion 3.5 normalises queries and keys (RMSNorm with a weight per stream),
and in the first 13 blocks of its medium size the picture also attends to itself alone:

    x <- x + gate_3 * W_2 Attention_2(LN(x) (1 + scale_3) + shift_3)      the same x as above

A class takes the text's place as `class_tokens` tokens of the text stream, and the pooled vector's
place as one vector; `semantic_path: attention` leaves the vector out, of a class and of a text. A
dropped text is the null text of `TextTokens`, its pooled vector zero. The publication masks no
padding: give its weights whole texts, without `text_lengths`. State-dict names are those of the
published weights, `pos_embed` included, the table from whose centre positions are cropped.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import option
from etude.kernels import (
    QKNorm,
    adaln_modulate,
    attention_packed,
    gate_residual,
    gate_residual_adaln,
    joint_attention,
    joint_projection,
)

from .blocks import (
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    Stream,
    TimestepEmbedder,
    add_and_modulate,
    draw_linears,
    draw_small,
    modulation,
    positions_2d,
    run_block,
    seeded,
    unpatchify,
    vector_mlp,
    zeroed,
)
from .conditioning import (
    ClassTokens,
    ControlEmbedder,
    TextTokens,
    content_tokens,
    labels_of,
    zero_where,
)
from .denoiser import Condition, TransformerConfig

HEAD = 64  # channels of a head, as published


def _published(depth: int, table: int, **more: Any) -> dict[str, Any]:
    sizes = {"depth": depth, "hidden_size": HEAD * depth, "num_heads": depth, "patch_size": 2}
    return sizes | {"in_channels": 16, "position_table": table, "position_base": 16} | more


PRESETS: dict[str, dict[str, Any]] = {
    "sd3-medium": _published(24, 192),
    "sd3.5-medium": _published(24, 384, qk_norm="rms", dual_attention_layers=13),
    "sd3.5-large": _published(38, 192, qk_norm="rms"),
    # DiT-XL's width; the depth and the heads of Berrada et al. 2024 are not known to us.
    "mmDiT-XL-18/2": {"depth": 18, "hidden_size": 1152, "patch_size": 2},
    "mmDiT-XL-28/2": {"depth": 28, "hidden_size": 1152, "patch_size": 2},
}
Preset = Literal[tuple(["", *PRESETS])]  # type: ignore[valid-type]


class MMDiTConfig(TransformerConfig):
    """Shape of an mmDiT; `preset` fills the sizes of a published model."""

    presets: ClassVar = PRESETS

    family: Literal["mmdit"] = option("mmdit", "the kind of network")
    preset: Preset = option("", "a known size such as sd3-medium; empty: the fields below")
    learn_sigma: bool = option(False, "also return a variance for every channel")
    hidden_size: int = option(768, "width of both residual streams", gt=0, multiple_of=4)
    num_heads: int = option(
        0,
        "attention heads; 0: one per 64 channels as published (an mmDiT-XL has 18 then; whether"
        " the study's had these or DiT-XL's 16 is not known)",
        ge=0,
    )
    qk_norm: Literal["none", "rms"] = option(
        "none", "normalisation of every head's queries and keys; rms: Stable Diffusion 3.5"
    )
    dual_attention_layers: int = option(
        0, "first blocks in which the picture also attends to itself alone", unit="blocks", ge=0
    )
    position_table: int = option(
        0, "side of the table that positions are cropped from; 0: none beyond", unit="tokens", ge=0
    )
    position_base: int = option(
        0,
        "positions run from 0 to this over the picture, as on a grid of this side (16 as published:"
        " 256 pixels); 0: to the picture's own side",
        unit="tokens",
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> "MMDiTConfig":
        if not self.num_heads and self.hidden_size % HEAD:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of {HEAD}: set num_heads"
            )
        if self.dual_attention_layers > self.depth:
            raise ValueError(
                f"dual_attention_layers={self.dual_attention_layers} is more than"
                f" depth={self.depth}"
            )
        if self.position_table and self.position_table < self.grid:
            raise ValueError(
                f"position_table={self.position_table} is smaller than the picture's {self.grid}"
                " tokens along a side"
            )
        wanted = self.conditioning
        if wanted.semantic_path == "adaln":
            raise ValueError(
                "semantic_path: adaln would leave mmdit's text stream without a text or a class:"
                " set published or attention"
            )
        if wanted.semantic == "text" and self.has_vector and not wanted.pooled_width:
            raise ValueError(
                "mmdit's published path puts the text's pooled vector into adaLN: set pooled_width"
                " (2048 as published), or semantic_path: attention"
            )
        if wanted.pooled_width and not self.has_vector:
            raise ValueError(
                "pooled_width has no effect with semantic_path: attention: leave it out, or set"
                " semantic_path: published"
            )
        return self

    @property
    def heads(self) -> int:
        return self.num_heads or self.hidden_size // HEAD

    @property
    def has_vector(self) -> bool:
        """Whether the content enters adaLN beside the text stream."""
        return self.conditioning.semantic_path != "attention"


class StreamAttention(nn.Module):
    """The attention weights of one stream; called, its tokens (B, N, D) attend to themselves."""

    def __init__(self, config: MMDiTConfig, *, pre_only: bool = False) -> None:
        super().__init__()
        D, self.num_heads = config.hidden_size, config.heads
        self.qkv = nn.Linear(D, 3 * D)
        if not pre_only:
            self.proj = nn.Linear(D, D)
        self.normed = config.qk_norm == "rms"
        if self.normed:
            self.ln_q = nn.RMSNorm(D // self.num_heads, eps=1e-6)
            self.ln_k = nn.RMSNorm(D // self.num_heads, eps=1e-6)

    @property
    def norm(self) -> QKNorm | None:
        return QKNorm("rmsnorm", self.ln_q.weight, self.ln_k.weight) if self.normed else None

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(attention_packed(qkv, qk_norm=self.norm).flatten(2))


class StreamBlock(nn.Module):
    """What a block has for one stream, in two halves: before the joint attention and after it."""

    def __init__(self, config: MMDiTConfig, *, pre_only: bool = False, dual: bool = False) -> None:
        super().__init__()
        D, self.dual = config.hidden_size, dual
        self.attn = StreamAttention(config, pre_only=pre_only)
        # shift_1, scale_1, the neighbours gate_1, shift_2, scale_2, and gate_2; then with a second
        # attention shift_3 beside scale_3, and gate_3.
        chunks = (1, 1) if pre_only else (1, 1, 3, 1)
        if dual:
            self.attn2 = StreamAttention(config)
            chunks = (*chunks, 2, 1)
        if not pre_only:
            self.mlp = Mlp(D, int(D * config.mlp_ratio))
        self.sizes = [D * chunk for chunk in chunks]
        self.adaLN_modulation = modulation(D, sum(chunks))

    def enter(self, stream: Stream, c: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The stream (B, N, D), what its queries, keys and values are made of, and the vectors."""
        vectors = self.adaLN_modulation(c).split(self.sizes, 1)
        x, y = add_and_modulate(*stream, vectors[0], vectors[1])
        return x, y, vectors

    def leave(self, x: Tensor, attended: Tensor, vectors: tuple[Tensor, ...]) -> Stream:
        """The stream behind the block; attended: (B, N, H, d) of the joint attention."""
        branch = self.attn.proj(attended.flatten(2))
        if self.dual:
            own = self.attn2(adaln_modulate(x, modulation=vectors[4]))
            x = gate_residual(x, own, vectors[5])
        x, y = gate_residual_adaln(x, branch, modulation=vectors[2])
        return x, self.mlp(y), vectors[3]


class JointBlock(nn.Module):
    """One block: both streams, each with its last branch still to be added."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.last = index == config.depth - 1
        self.context_block = StreamBlock(config, pre_only=self.last)
        self.x_block = StreamBlock(config, dual=index < config.dual_attention_layers)

    def forward(
        self, image: Stream, text: Stream, c: Tensor, lengths: Tensor | None
    ) -> tuple[Stream, Stream | None]:
        """Both streams behind the block; no text behind the last.

        lengths: (B,) int32 of tokens to attend to, the picture's and a text's; None for all.
        """
        x, y, vectors = self.x_block.enter(image, c)
        context, z, text_vectors = self.context_block.enter(text, c)
        own, other = self.x_block.attn, self.context_block.attn
        # Picture first, so that the padding of a text is the end of the sequence, which `lengths`
        # cuts off: the two operators get the streams in each other's place.
        qkv = joint_projection(
            z, y, other.qkv.weight, other.qkv.bias, own.qkv.weight, own.qkv.bias, own.num_heads
        )
        from_text, from_image = joint_attention(
            qkv, y.shape[1], qk_norm=other.norm, text_qk_norm=own.norm, key_lengths=lengths
        )
        image = self.x_block.leave(x, from_image, vectors)
        if self.last:
            return image, None
        return image, self.context_block.leave(context, from_text, text_vectors)


class VectorEmbedder(nn.Module):
    """A text's pooled vector (B, pooled_width) to (B, D)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = vector_mlp(width, hidden_size)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.mlp(pooled.to(self.mlp[0].weight.dtype))


class MMDiT(nn.Module):
    """Denoiser with the original parameter names; the weights are a function of `seed`."""

    def __init__(self, config: MMDiTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D, wanted = config.hidden_size, config.conditioning
        with seeded(seed):
            self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, D)
            self.t_embedder = TimestepEmbedder(D)
            if wanted.semantic == "text":
                self.text_tokens = TextTokens(wanted)
                self.context_embedder = nn.Linear(wanted.text_width, D)
                if config.has_vector:
                    self.y_embedder = VectorEmbedder(wanted.pooled_width, D)
            else:
                self.class_embedder = ClassTokens(config.num_classes, wanted.class_tokens, D)
                if config.has_vector:
                    self.y_embedder = LabelEmbedder(config.num_classes, D)
            if wanted.control:
                self.control_embedder = ControlEmbedder(D, wanted)
            self.register_buffer("pos_embed", _positions(config))
            self.joint_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.depth))
            self.final_layer = FinalLayer(D, config.patch_size, config.out_channels)
            self._initialise()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction for noisy latents; arguments and result as in `denoiser.py`.

        Reads `labels`, or `text`, `text_lengths`, `text_noise` and `pooled`; `drop_semantic`; and
        with control `control` and `drop_control`.
        """
        config = self.config
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self._cropped()
        c = self._vector(t, condition)
        context, lengths = content_tokens(self, condition)
        if lengths is not None:
            lengths = (lengths + tokens.shape[1]).to(torch.int32)
        image: Stream = (tokens, None, None)
        text: Stream | None = (context, None, None)
        recompute = config.activation_checkpointing
        for block in self.joint_blocks:
            image, text = run_block(block, image, text, c, lengths, recompute=recompute)
        patches = self.final_layer(*image, c)
        return unpatchify(patches, config.out_channels, config.patch_size)

    def _vector(self, t: Tensor, condition: Condition) -> Tensor:
        """What adaLN is a function of, (B, D)."""
        config = self.config
        c = self.t_embedder(t)
        if config.has_vector and config.conditioning.semantic == "text":
            pooled = zero_where(condition.get("drop_semantic"), condition["pooled"])
            c = c + self.y_embedder(pooled)
        elif config.has_vector:
            c = c + self.y_embedder(labels_of(condition, config.num_classes))
        if config.conditioning.control:
            c = c + self.control_embedder(t, condition["control"], condition.get("drop_control"))
        return c

    def _cropped(self) -> Tensor:
        """The centre of the position table, (1, N, D)."""
        grid, side = self.config.grid, _side(self.config)
        first = (side - grid) // 2
        inside = slice(first, first + grid)
        return self.pos_embed.unflatten(1, (side, side))[:, inside, inside].flatten(1, 2)

    def _initialise(self) -> None:
        """As a DiT's: the reference that published the names has no training code."""
        draw_linears(self)
        nn.init.zeros_(self.x_embedder.proj.bias)
        embedders = [self.t_embedder, getattr(self, "y_embedder", None)]
        mlps = [embedder.mlp for embedder in embedders if hasattr(embedder, "mlp")]
        draw_small(layer.weight for mlp in mlps for layer in (mlp[0], mlp[2]))
        draw_small(m.weight for m in self.modules() if isinstance(m, nn.Embedding))
        streams = [s for block in self.joint_blocks for s in (block.x_block, block.context_block)]
        zero = [part.adaLN_modulation[1] for part in (*streams, self.final_layer)]
        for layer in (*zero, self.final_layer.linear):
            zeroed(layer)
        if self.config.conditioning.control:
            self.control_embedder.initialise(self.config.conditioning.control_zero)


def _side(config: MMDiTConfig) -> int:
    """Tokens along a side of the position table."""
    return config.position_table or config.grid


def _positions(config: MMDiTConfig) -> Tensor:
    """The position table (1, side * side, D): its centre is the picture's, beginning at 0."""
    side = _side(config)
    step = config.position_base / config.grid if config.position_base else 1.0
    at = torch.arange(side, dtype=torch.float64) - (side - config.grid) // 2
    return positions_2d(config.hidden_size, side, at * step)[None]
