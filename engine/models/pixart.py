"""PixArt-alpha, the text-conditional diffusion transformer with adaLN-single (Chen et al. 2023).

Called by training and sampling through a denoiser. With c = time (+ control), one map shared by all
blocks and a table E of six vectors for each block,

    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = W SiLU(c) + b + E
    x <- x + gate_1 * Attention(LN(x) (1 + scale_1) + shift_1)
    x <- x + CrossAttention(x, tokens of the text)           no norm, no gate, starts at zero
    x <- x + gate_2 * MLP(LN(x) (1 + scale_2) + shift_2)

and the final layer takes its shift and scale from c itself and a table of two vectors. State-dict
names and parameter counts are those of the published models (610,856,096 for PixArt-XL/2 with text
of 4096 channels; 611,349,152 with the micro-conditions of its multi-scale variant).

A picture may also be asked for by a class, which becomes one or more tokens in the text's place.

The residual stream is fused as in `dit.py`; the text's branch has no gate, so a gate of ones stands
in: its addition and the next normalisation are then one pass too. Texts stay padded and attention
ends at each text's length. Packing them, as the publication does, would spare the keys and values
of the padding (at most 240 D^2 of a block's 3,824 D^2 multiply-adds for 256 tokens and 120 of text,
240 of 14,576 for 1024), but its shapes depend on the data: a wait for the device in every step, and
a graph that cannot be compiled once. The attention itself skips the padding either way.
"""

from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import option
from etude.kernels import (
    adaln_single,
    dot_product_attention,
    gate_residual,
    gate_residual_adaln,
)

from .blocks import (
    Attention,
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
    zeroed,
)
from .conditioning import (
    ClassTokens,
    ConditioningConfig,
    ControlEmbedder,
    TextTokens,
    labels_of,
    power_cosine,
    zero_where,
)
from .denoiser import Condition, TransformerConfig

_XL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": 2}
PRESETS = {
    "PixArt-XL/2": _XL | {"micro_conditions": False},
    "PixArt-XL/2-MS": _XL | {"micro_conditions": True},
}
Preset = Literal[tuple(["", *PRESETS])]  # type: ignore[valid-type]

# What the micro-conditions are made of, by the names of `conditioning.control`.
MICRO = ("height", "width", "aspect")


class PixArtConfig(TransformerConfig):
    """Shape of a PixArt; `preset` fills that of a published model."""

    presets: ClassVar = PRESETS

    family: Literal["pixart"] = option("pixart", "the architecture")
    preset: Preset = option("", "a published size such as PixArt-XL/2; empty: the fields below")
    base_size: int = option(
        0, "tokens per side that positions are spread over; 0: as many as there are", ge=0
    )
    interpolation_scale: float = option(
        1.0, "divides the positions; published: 2 for latents of 128, else 1", gt=0
    )
    micro_conditions: bool = option(
        False,
        "height, width and aspect of conditioning.control enter by the published layers (MS), which"
        " height and width share; other control as conditioning.control_embedding says",
    )

    @model_validator(mode="after")
    def _check(self) -> "PixArtConfig":
        if self.conditioning.semantic_path == "adaln":
            raise ValueError(
                "semantic_path: adaln would leave PixArt's cross-attention without tokens: set it"
                " to published or attention, or take family dit"
            )
        if self.conditioning.pooled_width:
            raise ValueError(
                f"pooled_width={self.conditioning.pooled_width}: PixArt takes no pooled text,"
                " leave it out"
            )
        if self.micro_conditions:
            self._check_micro()
        return self

    def _check_micro(self) -> None:
        names = [control.name for control in self.conditioning.control]
        missing = [name for name in MICRO if name not in names]
        if missing:
            raise ValueError(
                f"micro_conditions needs {', '.join(missing)} in conditioning.control: add what is"
                " missing, or set micro_conditions: false"
            )
        if self.hidden_size % len(MICRO):
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of 3, which micro_conditions"
                " need: their three embeddings share it"
            )


class CaptionEmbedder(TextTokens):
    """A batch's text as padded tokens (B, L, D); the null text is `y_embedding`, never learned."""

    def __init__(self, hidden_size: int, config: ConditioningConfig) -> None:
        super().__init__(config, null="y_embedding")
        self.y_proj = Mlp(config.text_width, hidden_size, hidden_size)

    def forward(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D), and the number of them to attend to (B,), None for all."""
        text, lengths = super().forward(condition)
        return self.y_proj(text.to(self.y_proj.fc1.weight.dtype)), lengths


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, N, D) to those of a text (B, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor, lengths: Tensor | None) -> Tensor:
        """`lengths` (B,) int32: tokens of the text at or beyond it do not exist."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv_linear(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(dot_product_attention(q, k, v, key_lengths=lengths).flatten(2))


class PixArtBlock(nn.Module):
    """One transformer block on a stream whose last branch is still to be added."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.empty(6, hidden_size))

    def forward(
        self,
        x: Tensor,
        h: Tensor | None,
        gate: Tensor | None,
        shared: Tensor,
        ones: Tensor,
        context: Tensor,
        lengths: Tensor | None,
    ) -> Stream:
        """shared: (B, 6 D), the map of c; ones: (B, D), the gate of the text's branch."""
        vectors = adaln_single(shared, self.scale_shift_table)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.chunk(6, 1)
        x, y = add_and_modulate(x, h, gate, shift_1, scale_1)
        x = gate_residual(x, self.attn(y), gate_1)
        asked = self.cross_attn(x, context, lengths)
        x, y = gate_residual_adaln(x, asked, ones, shift_2, scale_2)
        return x, self.mlp(y), gate_2


class TableFinalLayer(nn.Module):
    """As `blocks.FinalLayer`, its shift and scale from c itself and a table."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))

    def forward(self, x: Tensor, h: Tensor, gate: Tensor, c: Tensor) -> Tensor:
        shift, scale = adaln_single(c.repeat(1, 2), self.scale_shift_table).chunk(2, 1)
        return self.linear(gate_residual_adaln(x, h, gate, shift, scale)[1])


class PixArt(nn.Module):
    """Denoiser with the original parameter names; the weights are a function of `seed`."""

    def __init__(self, config: PixArtConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D, given = config.hidden_size, config.conditioning
        # Columns of the control that have embedders of their own as published, and the others.
        names = [control.name for control in given.control]
        self.micro = [names.index(name) for name in MICRO] if config.micro_conditions else []
        self.columns = [k for k in range(len(names)) if k not in self.micro]
        with seeded(seed):
            self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, D)
            self.t_embedder = TimestepEmbedder(D)
            self.t_block = modulation(D, 6)
            if given.semantic == "text":
                self.y_embedder = CaptionEmbedder(D, given)
            else:
                self.class_embedder = ClassTokens(config.num_classes, given.class_tokens, D)
            if self.micro:
                self.csize_embedder = TimestepEmbedder(D // 3)
                self.ar_embedder = TimestepEmbedder(D // 3)
            if self.columns:
                others = tuple(given.control[k] for k in self.columns)
                rest = given.model_copy(update={"control": others})
                self.control_embedder = ControlEmbedder(D, rest)
            self.register_buffer("pos_embed", positions(config))
            self.blocks = nn.ModuleList(
                PixArtBlock(D, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
            )
            self.final_layer = TableFinalLayer(D, config.patch_size, config.out_channels)
            self._initialise()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction for noisy latents; `denoiser.py` says what goes in and comes out.

        Read of the condition: labels or text, text_lengths and text_noise, control, and what is
        dropped.
        """
        config = self.config
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed
        c = self._vector(t, condition)
        shared, ones = self.t_block(c), torch.ones_like(c)
        context, lengths = self._context(condition)
        stream: Stream = (tokens, None, None)
        more, recompute = (shared, ones, context, lengths), config.activation_checkpointing
        for block in self.blocks:
            stream = run_block(block, *stream, *more, recompute=recompute)
        patches = self.final_layer(*stream, c)
        return unpatchify(patches, config.out_channels, config.patch_size)

    def _vector(self, t: Tensor, condition: Condition) -> Tensor:
        """c (B, D): the time's vector and that of the control."""
        c = self.t_embedder(t)
        dropped = condition.get("drop_control")
        if self.micro:
            c = c + self._micro(t, condition["control"], dropped)
        if self.columns:
            values = torch.stack([condition["control"][:, k] for k in self.columns], 1)
            c = c + self.control_embedder(t, values, dropped)
        return c

    def _micro(self, t: Tensor, control: Tensor, dropped: Tensor | None) -> Tensor:
        """(B, D): a third each of height and width, which share an embedder, and of aspect."""
        entries = [self.config.conditioning.control[k] for k in self.micro]
        time = t.to(torch.promote_types(t.dtype, torch.float32)) / 1000.0
        gates = torch.stack([power_cosine(time, entry.exponent) for entry in entries], 1)
        columns = zip(self.micro, entries, strict=True)
        values = torch.stack([control[:, k] * entry.scale for k, entry in columns], 1)
        parts = self.csize_embedder(values[:, :2]), self.ar_embedder(values[:, 2:])
        out = torch.cat(parts, 1)
        out = (gates.to(out.dtype)[:, :, None] * out).flatten(1)
        return zero_where(dropped, out)

    def _context(self, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """Tokens to attend to (B, L, D), and how many of them exist (B,) int32, None for all."""
        if self.config.conditioning.semantic == "class":
            return self.class_embedder(labels_of(condition, self.config.num_classes)), None
        context, lengths = self.y_embedder(condition)
        return context, None if lengths is None else lengths.to(torch.int32)

    def _initialise(self) -> None:
        given, D = self.config.conditioning, self.config.hidden_size
        draw_linears(self)  # the patches' bias is published as torch's convolution draws it
        small = [self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.t_block[1]]
        if given.semantic == "text":
            small += [self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2]
            nn.init.normal_(self.y_embedder.y_embedding, std=given.text_width**-0.5)
        else:
            small.append(self.class_embedder.embedding_table)
        if self.micro:
            for embedder in (self.csize_embedder, self.ar_embedder):
                small += [embedder.mlp[0], embedder.mlp[2]]
        draw_small(layer.weight for layer in small)
        for module in (*self.blocks, self.final_layer):
            nn.init.normal_(module.scale_shift_table, std=D**-0.5)
        zero = [block.cross_attn.proj for block in self.blocks] + [self.final_layer.linear]
        if self.micro and given.control_zero:
            zero += [self.csize_embedder.mlp[2], self.ar_embedder.mlp[2]]
        for layer in zero:
            zeroed(layer)
        if self.columns:
            self.control_embedder.initialise(given.control_zero)


def positions(config: PixArtConfig) -> Tensor:
    """The table of positions (1, N, D) float32, of a grid stretched over `base_size` tokens."""
    grid = config.grid
    stretch = grid / (config.base_size or grid)
    at = torch.arange(grid, dtype=torch.float32) / stretch / config.interpolation_scale
    return positions_2d(config.hidden_size, grid, at)[None]
