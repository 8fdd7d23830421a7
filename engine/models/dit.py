"""DiT, the class-conditional diffusion transformer with adaLN-Zero (Peebles and Xie 2023).

Built by `families.py`, called by training and sampling. With c = time + label + control a block is

    x <- x + gate_1 * Attention(LN(x) (1 + scale_1) + shift_1)
    x <- x + gate_2 * MLP(LN(x) (1 + scale_2) + shift_2)

where the six vectors are a linear map of SiLU(c) that starts at zero, so a new network is the
identity followed by a final layer that returns zero. State-dict names and the parameter count are
those of the published models (675,129,632 for DiT-XL/2 at 32 x 32 with learned sigma).

SiT (Ma et al. 2024) is the same network under a flow objective. Options make the modern variant
(RMSNorm, normalised queries and keys, rotary positions, SwiGLU, as LightningDiT has them: Yao et
al. 2025) and two other starts of the modulation (arXiv 2608.09438): `gaussian` draws its weights
with a spread of about 1e-3 instead of zero, `bottleneck` puts a narrow layer before it.

With `semantic_path: attention`, or asked by text, the content leaves c: its tokens stand behind the
picture's, pass all blocks and are left out at the end (section 3.2's in-context conditioning, with
the time still in c). They have no position of their own.

The residual stream is fused: a block hands on its last branch not yet added, and the next block
adds it in the same pass that normalises (`gate_residual_adaln`).
"""

from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import option
from etude.kernels import gate_residual_adaln
from etude.kernels.attention import Rope

from .blocks import (
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    Stream,
    SwiGLU,
    TimestepEmbedder,
    add_and_modulate,
    draw_linears,
    draw_small,
    modulation,
    positions_2d,
    rotary_2d,
    run_block,
    seeded,
    unpatchify,
    zeroed,
)
from .conditioning import ClassTokens, ControlEmbedder, TextTokens, content_tokens, labels_of
from .denoiser import Condition, TransformerConfig

SIZES = {  # depth, hidden size, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PRESETS = {
    f"DiT-{size}/{patch}": {
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": heads,
        "patch_size": patch,
    }
    for size, (depth, hidden, heads) in SIZES.items()
    for patch in (1, 2, 4, 8)
}
Preset = Literal[tuple(["", *PRESETS])]  # type: ignore[valid-type]

# Spreads of adaLN-Gaussian's second form: the shift's, the scale's and the gate's weights.
GAUSSIAN = (8e-4, 1.2e-3, 8e-4)


class DiTConfig(TransformerConfig):
    """Shape of a DiT; `preset` fills the four sizes of a published model."""

    presets: ClassVar = PRESETS

    family: Literal["dit"] = option("dit", "the kind of network")
    preset: Preset = option("", "a published size such as DiT-XL/2; empty: the fields below")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "what adaLN normalises by")
    mlp: Literal["gelu", "swiglu"] = option(
        "gelu", "swiglu has two thirds of the inner width, so that the parameters stay as many"
    )
    qk_norm: bool = option(False, "RMSNorm of every head's queries and keys")
    positions: Literal["table", "rope", "both"] = option(
        "table", "where a token says its place: added to it, turning its queries and keys, or both"
    )
    position_base: int = option(
        0,
        "positions run from 0 to this over the picture, as on a grid of this side; 0: to the"
        " picture's own side",
        unit="tokens",
        ge=0,
    )
    modulation_start: Literal["zero", "gaussian"] = option(
        "zero", "weights of the modulation at the start: adaLN-Zero or adaLN-Gaussian"
    )
    modulation_bottleneck: int = option(
        1, "SE-adaLN-Zero: the modulation's inner width is hidden_size over this; 1: none", gt=0
    )

    @model_validator(mode="after")
    def _check(self) -> "DiTConfig":
        if self.positions != "table" and self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"positions: {self.positions} turns channels by fours, but a head has"
                f" {self.hidden_size // self.num_heads}: change num_heads, or set positions: table"
            )
        if self.hidden_size % self.modulation_bottleneck:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of"
                f" modulation_bottleneck={self.modulation_bottleneck}"
            )
        asked = self.conditioning
        if asked.semantic == "text" and asked.semantic_path == "adaln":
            raise ValueError("semantic_path: adaln has no place for a text: leave it out")
        if asked.pooled_width:
            raise ValueError(
                "family dit has no place for a pooled text: leave out pooled_width, or set family:"
                " mmdit"
            )
        if asked.class_tokens > 1 and not self.context_tokens:
            raise ValueError(
                f"class_tokens={asked.class_tokens} has no effect where a dit's class enters adaLN:"
                " leave it out, or set semantic_path: attention"
            )
        return self

    @property
    def context_tokens(self) -> int:
        """Tokens of the content that stand behind the picture's; 0 where it enters adaLN."""
        asked = self.conditioning
        if asked.semantic == "text":
            return asked.text_tokens
        return asked.class_tokens if asked.semantic_path == "attention" else 0

    @property
    def coordinates(self) -> Tensor:
        """Positions of the tokens of a row, and of a column: (grid,) float64."""
        step = self.position_base / self.grid if self.position_base else 1.0
        return torch.arange(self.grid, dtype=torch.float64) * step


class DiTBlock(nn.Module):
    """One transformer block on a stream whose last branch is still to be added."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, self.norm = config.hidden_size, config.norm
        self.attn = Attention(D, config.num_heads, qk_norm=config.qk_norm)
        inner = int(D * config.mlp_ratio)
        self.mlp = Mlp(D, inner) if config.mlp == "gelu" else SwiGLU(D, 2 * inner // 3)
        self.adaLN_modulation = modulation(D, 6, config.modulation_bottleneck)

    def forward(
        self,
        x: Tensor,
        h: Tensor | None,
        gate: Tensor | None,
        c: Tensor,
        rope: Rope | None = None,
        lengths: Tensor | None = None,
    ) -> Stream:
        D = x.shape[-1]
        # Six vectors: shift_1, scale_1, the neighbours gate_1, shift_2, scale_2, and gate_2.
        vectors = self.adaLN_modulation(c).split((D, D, 3 * D, D), 1)
        x, y = add_and_modulate(x, h, gate, vectors[0], vectors[1], self.norm)
        x, y = gate_residual_adaln(
            x, self.attn(y, rope, lengths), modulation=vectors[2], norm=self.norm
        )
        return x, self.mlp(y), vectors[3]


class DiT(nn.Module):
    """Denoiser with the original parameter names; the weights are a function of `seed`."""

    def __init__(self, config: DiTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D, grid = config.hidden_size, config.grid
        with seeded(seed):
            self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, D)
            self.t_embedder = TimestepEmbedder(D)
            if config.conditioning.semantic == "text":
                self.text_tokens = TextTokens(config.conditioning)
                self.context_embedder = nn.Linear(config.conditioning.text_width, D)
            elif config.context_tokens:
                self.class_embedder = ClassTokens(config.num_classes, config.context_tokens, D)
            else:
                self.y_embedder = LabelEmbedder(config.num_classes, D)
            if config.conditioning.control:
                self.control_embedder = ControlEmbedder(D, config.conditioning)
            if config.positions != "rope":
                table = positions_2d(D, grid, config.coordinates)[None]
                self.pos_embed = nn.Parameter(table, requires_grad=False)
            if config.positions != "table":
                cos, sin = rotary_2d(D // config.num_heads, grid, config.coordinates)
                still = cos.new_zeros(config.context_tokens, cos.shape[1])  # not turned at all
                self.register_buffer("rope_cos", torch.cat((cos, still + 1)), persistent=False)
                self.register_buffer("rope_sin", torch.cat((sin, still)), persistent=False)
            self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
            self.final_layer = FinalLayer(D, config.patch_size, config.out_channels, config.norm)
            self._initialise()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction for noisy latents; arguments and result as in `denoiser.py`.

        Read of the condition: labels or text, text_lengths and text_noise, control, and what is
        dropped.
        """
        config = self.config
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        if config.positions != "rope":
            tokens = tokens + self.pos_embed
        rope = None if config.positions == "table" else (self.rope_cos, self.rope_sin)
        c, count, lengths = self.t_embedder(t), tokens.shape[1], None
        if config.context_tokens:
            context, lengths = content_tokens(self, condition)
            lengths = None if lengths is None else (lengths + count).to(torch.int32)
            tokens = torch.cat((tokens, context), dim=1)
        else:
            c = c + self.y_embedder(labels_of(condition, config.num_classes))
        if config.conditioning.control:
            c = c + self.control_embedder(t, condition["control"], condition.get("drop_control"))
        stream: Stream = (tokens, None, None)
        recompute = config.activation_checkpointing
        for block in self.blocks:
            stream = run_block(block, *stream, c, rope, lengths, recompute=recompute)
        patches = self.final_layer(*stream, c)[:, :count]
        return unpatchify(patches, config.out_channels, config.patch_size)

    def _initialise(self) -> None:
        draw_linears(self)
        nn.init.zeros_(self.x_embedder.proj.bias)
        named = [getattr(self, name, None) for name in ("y_embedder", "class_embedder")]
        draw_small(embedder.embedding_table.weight for embedder in named if embedder is not None)
        draw_small((self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight))
        for part in (*self.blocks, self.final_layer):
            zeroed(part.adaLN_modulation[-1])
        zeroed(self.final_layer.linear)
        if self.config.conditioning.control:
            self.control_embedder.initialise(self.config.conditioning.control_zero)
        if self.config.modulation_start == "gaussian":
            for block in self.blocks:
                for k, part in enumerate(block.adaLN_modulation[-1].weight.chunk(6)):
                    nn.init.normal_(part, std=GAUSSIAN[k % 3])
