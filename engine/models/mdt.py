"""MDTv2, the masked diffusion transformer (Gao et al. 2023, "MDTv2: Masked Diffusion Transformer
is a Strong Image Synthesizer").

Built by name from a recipe's model section; called by training and sampling. A block is DiT's, with
a bias b[i - j] per head and relative position in attention, and in the later blocks a skip before:

    x <- W_skip [x, skip]                                              out and decoder blocks
    x <- x + gate_1 * Attention(LN(x) (1 + scale_1) + shift_1; softmax(q k / sqrt(d) + b))
    x <- x + gate_2 * MLP(LN(x) (1 + scale_2) + shift_2)

The encoder is half `en_inblocks`, half `en_outblocks`, joined as in a U-Net: the first out block
takes what the last in block gave, and so on outward. To its result a learned `decoder_pos_embed` is
added, and the skip of every decoder block is the tokens as they entered the encoder.

Training adds to each step a masked pass, asked for by `condition["keep"]`. The encoder sees the
kept tokens alone, with the biases between those, and `mask_token` stands for the others. With z the
tokens of the whole picture, `decoder_pos_embed` added, the side-interpolater predicts the missing:

    z_i <- SideBlock(z)_i        where token i was not kept; elsewhere z_i stays

The decoder then sees all tokens as ever; its skips hold the whole picture, masked or not. Sampling
never runs the side block. State-dict names are those of the published weights but for the index of
the bias table, which is computed (`etude.convert.mdt`); MDTv2-XL/2 has 742,263,904 parameters.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import option

from .blocks import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    Stream,
    TimestepEmbedder,
    draw_linears,
    draw_small,
    positions_2d,
    run_block,
    seeded,
    unpatchify,
    zeroed,
)
from .conditioning import ControlEmbedder, labels_of
from .denoiser import Condition, TransformerConfig
from .dit import SIZES
from .mdt_blocks import Kept, MDTBlock, complete

# Decoder blocks where a published run says how many.
DECODE_LAYERS = {"S": 6, "XL": 4}
PRESETS: dict[str, dict[str, int]] = {
    f"MDTv2-{size}/2": {
        "depth": depth,
        "hidden_size": hidden,
        "num_heads": heads,
        "patch_size": 2,
    }
    | ({"decode_layer": DECODE_LAYERS[size]} if size in DECODE_LAYERS else {})
    for size, (depth, hidden, heads) in SIZES.items()
}
Preset = Literal[tuple(["", *PRESETS])]  # type: ignore[valid-type]


class MDTConfig(TransformerConfig):
    """Shape of an MDTv2; `preset` fills the sizes of a published model."""

    presets: ClassVar = PRESETS

    family: Literal["mdt"] = option("mdt", "the kind of network")
    preset: Preset = option("", "a published size such as MDTv2-XL/2; empty: the fields below")
    depth: int = option(12, "blocks of encoder and decoder; the side block is one more", gt=0)
    decode_layer: int = option(4, "how many of them are the decoder's", unit="blocks", gt=0)
    mask_ratio: tuple[float, float] | None = option(
        (0.3, 0.5), "least and largest share that a step's second, masked pass leaves out; or null"
    )

    @model_validator(mode="after")
    def _check(self) -> "MDTConfig":
        low, high = self.mask_ratio or (0.0, 0.0)
        if not 0.0 <= low <= high < 1.0:
            raise ValueError(f"mask_ratio={self.mask_ratio} must be two shares in order below 1")
        if self.depth <= self.decode_layer or (self.depth - self.decode_layer) % 2:
            raise ValueError(
                f"depth={self.depth} and decode_layer={self.decode_layer} leave"
                f" {self.depth - self.decode_layer} blocks for the encoder: it needs an even"
                " number, 2 or more"
            )
        asked = self.conditioning
        if asked.semantic == "text" or asked.semantic_path == "attention":
            raise ValueError("family mdt takes a class through adaLN: set family: pixart or mmdit")
        return self


class MDT(nn.Module):
    """Denoiser with the original parameter names; the weights are a function of `seed`."""

    def __init__(self, config: MDTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        D, grid = config.hidden_size, config.grid
        half = (config.depth - config.decode_layer) // 2

        def blocks(count: int, *, skip: bool) -> nn.ModuleList:
            shape = (D, config.num_heads, config.mlp_ratio, grid)
            return nn.ModuleList(MDTBlock(*shape, skip=skip) for _ in range(count))

        with seeded(seed):
            self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, D)
            self.t_embedder = TimestepEmbedder(D)
            self.y_embedder = LabelEmbedder(config.num_classes, D)
            if config.conditioning.control:
                self.control_embedder = ControlEmbedder(D, config.conditioning)
            self.pos_embed = nn.Parameter(positions_2d(D, grid)[None])
            self.decoder_pos_embed = nn.Parameter(positions_2d(D, grid)[None])
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
            self.en_inblocks = blocks(half, skip=False)
            self.en_outblocks = blocks(half, skip=True)
            self.de_blocks = blocks(config.decode_layer, skip=True)
            self.sideblocks = blocks(1, skip=False)
            self.final_layer = FinalLayer(D, config.patch_size, config.out_channels)
            self._initialise()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction for noisy latents; arguments and result as in `denoiser.py`.

        Reads `labels`, `drop_semantic`, with control `control` and `drop_control`, and `keep`:
        (B, K) int64, the kept tokens of a masked pass, distinct in a row (`keep_indices`); absent:
        all. Errors: ValueError for a `keep` of another shape or dtype.
        """
        config = self.config
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(labels_of(condition, config.num_classes))
        if config.conditioning.control:
            c = c + self.control_embedder(t, condition["control"], condition.get("drop_control"))
        keep = condition.get("keep")
        if keep is None:
            x = self._encode(tokens, c, None) + self.decoder_pos_embed
        else:
            kept = Kept.of(keep, *tokens.shape[:2])
            x = self._interpolate(self._encode(kept.take(tokens), c, kept), c, kept)
        stream: Stream = (x, None, None)
        for block in self.de_blocks:
            _, *stream = self._run(block, *stream, c, tokens)
        patches = self.final_layer(*stream, c)
        return unpatchify(patches, config.out_channels, config.patch_size)

    def _encode(self, x: Tensor, c: Tensor, kept: Kept | None) -> Tensor:
        """In blocks and out blocks: tokens (B, N or K, D) to as many."""
        stream: Stream = (x, None, None)
        skips = []
        for n, block in enumerate(self.en_inblocks):
            before, *stream = self._run(block, *stream, c, None, kept)
            if n:  # what the block before this one gave
                skips.append(before)
        x = complete(*stream)
        skips.append(x)
        stream = (x, None, None)
        for block in self.en_outblocks:
            _, *stream = self._run(block, *stream, c, skips.pop(), kept)
        return complete(*stream)

    def _interpolate(self, x: Tensor, c: Tensor, kept: Kept) -> Tensor:
        """Kept tokens (B, K, D) to the whole picture's (B, N, D), the others predicted."""
        absent = kept.absent
        x = torch.where(absent, self.mask_token, kept.spread(x)) + self.decoder_pos_embed
        _, *stream = self._run(self.sideblocks[0], x, None, None, c)
        return torch.where(absent, complete(*stream), x)

    def _run(self, block: Callable, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return run_block(block, *arguments, recompute=self.config.activation_checkpointing)

    def _initialise(self) -> None:
        draw_linears(self)
        nn.init.zeros_(self.x_embedder.proj.bias)
        small = [self.y_embedder.embedding_table.weight, self.mask_token]
        small += [self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight]
        zero = [self.final_layer.adaLN_modulation[-1], self.final_layer.linear]
        for block in self.modules():
            if isinstance(block, MDTBlock):
                small.append(block.attn.rel_pos_bias.relative_position_bias_table)
                zero.append(block.adaLN_modulation[-1])
        draw_small(small)
        for layer in zero:
            zeroed(layer)
        if self.config.conditioning.control:
            self.control_embedder.initialise(self.config.conditioning.control_zero)


def keep_indices(uniforms: Tensor, ratio: float) -> Tensor:
    """The tokens that a masked pass keeps: (B, K) int64, rising in every row.

    Args:
        uniforms: (B, N), a number in [0, 1) for every token; the K least are kept, of equal ones
            the first.
        ratio: the share that is masked, in [0, 1); K = floor((1 - ratio) N). As published one draw
            from 0.3 to 0.5 per step serves the whole batch.

    Errors: ValueError for another ratio, or one that keeps nothing.
    """
    # The margin is for products such as 100 * 0.66, a little less than 66 in floating point.
    count = int(uniforms.shape[1] * (1.0 - ratio) + 1e-6)
    if not (0.0 <= ratio < 1.0 and count):
        raise ValueError(
            f"ratio={ratio} of {uniforms.shape[1]} tokens must be 0 or more and leave one"
        )
    least = uniforms.argsort(dim=1, stable=True)[:, :count]
    return least.sort(dim=1).values
