"""U-Net of latent diffusion: residual convolutions and attention to the condition's tokens.

Rombach et al. 2022 ("High-Resolution Image Synthesis with Latent Diffusion Models"), and its wider
form with SDXL's control conditions (Podell et al. 2023). Built by `families.py`, called by training
and sampling. With an embedding e of the time, the levels' blocks are

    ResBlock            x <- skip(x) + conv(silu(norm(conv(silu(norm(x))) + linear(silu(e)))))
    SpatialTransformer  x <- x + proj(blocks(proj(norm(x)))), a block being self-attention over the
                        positions, attention to the context and a GEGLU feed-forward, each residual

on the way down, once in the middle, and on the way up, where every block also takes the feature map
that the way down left at its size (concatenated). A new network returns zero.

What enters where: a class is one or more context tokens (`published`, `attention`) or added to e
(`adaln`; the blocks then have no attention to a context). A text is the context; its one vector, if
it has one, goes through `label_emb` into e. Control goes into e too: through the same `label_emb`
where it is SDXL's (`concatenated` with exponent 0, so that nothing depends on the time), otherwise
through `ControlEmbedder`. What is dropped enters `label_emb` as zeros, as in SDXL.

State-dict names are those of the published repositories; `class_embedder`, `text_tokens` and
`control_embedder` are ours. Without them cin256-v2 (`ldm4` with 3 channels) has 400,920,579
parameters, SDXL 2,567,463,684.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from etude.kernels import modulation_gemm

from .blocks import LabelEmbedder, run_block, seeded, sinusoids, vector_mlp, zeroed
from .conditioning import (
    FREQUENCIES,
    ClassTokens,
    ControlEmbedder,
    TextTokens,
    labels_of,
    scaled,
    zero_where,
)
from .denoiser import Condition
from .unet_blocks import (
    Block,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Upsample,
)
from .unet_config import Stage, UNetConfig, stages

__all__ = ["UNet", "UNetConfig"]


class UNet(nn.Module):
    """Denoiser with the original parameter names; the weights are a function of `seed`."""

    def __init__(self, config: UNetConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        first, time, asked = config.model_channels, config.time_width, config.conditioning
        down, up = stages(config)
        with seeded(seed):
            self.time_embed = vector_mlp(first, time)
            if config.vector_width:
                self.label_emb = nn.Sequential(vector_mlp(config.vector_width, time))
            if asked.semantic == "text":
                self.text_tokens = TextTokens(asked)
            elif config.tokens_width:
                self.class_embedder = ClassTokens(
                    config.num_classes, asked.class_tokens, config.tokens_width
                )
            else:
                self.class_embedder = LabelEmbedder(config.num_classes, time)
            if asked.control and not config.sdxl_control:
                self.control_embedder = ControlEmbedder(time, asked)
            convolution = nn.Conv2d(config.in_channels, first, 3, padding=1)
            self.input_blocks = nn.ModuleList([Block([convolution])])
            self.input_blocks.extend(_stage(stage, config, upward=False) for stage in down)
            self.middle_block = _middle(config)
            self.output_blocks = nn.ModuleList(_stage(stage, config, upward=True) for stage in up)
            self.out = nn.Sequential(
                GroupNorm(config.width(0)),
                nn.Identity(),
                zeroed(nn.Conv2d(config.width(0), config.out_channels, 3, padding=1)),
            )
            self._initialise()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Raw prediction for noisy latents; arguments and result as in `denoiser.py`.

        Reads `labels`, or `text`, `text_lengths`, `text_noise` and `pooled`; `drop_semantic`; and
        with control `control` and `drop_control`.
        """
        config = self.config
        x = x.to(self.time_embed[0].weight.dtype)
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        shifts = self._shifts(self._embedding(t, condition))
        context, lengths = self._context(condition)
        recompute = config.activation_checkpointing

        def run(block: Block, x: Tensor) -> Tensor:
            own = tuple(next(shifts) for layer in block if isinstance(layer, ResBlock))
            return run_block(block, x, own, context, lengths, recompute=recompute)

        kept = []
        for block in self.input_blocks:
            x = run(block, x)
            kept.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat((x, kept.pop()), dim=1))
        return self.out(x).contiguous()

    def _embedding(self, t: Tensor, condition: Condition) -> Tensor:
        """What every residual block is told besides its input: (B, time_width)."""
        config, dtype = self.config, self.time_embed[0].weight.dtype
        e = self.time_embed(sinusoids(t, config.model_channels).to(dtype))
        if not config.tokens_width:
            e = e + self.class_embedder(labels_of(condition, config.num_classes))
        parts = []
        if config.conditioning.pooled_width:
            parts.append(zero_where(condition.get("drop_semantic"), condition["pooled"]))
        if config.sdxl_control:
            values = scaled(condition["control"], config.conditioning.control)
            waves = sinusoids(values, FREQUENCIES).flatten(1)
            parts.append(zero_where(condition.get("drop_control"), waves))
        elif config.conditioning.control:
            e = e + self.control_embedder(t, condition["control"], condition.get("drop_control"))
        if parts:
            e = e + self.label_emb(torch.cat([part.to(dtype) for part in parts], dim=1))
        return e

    def _shifts(self, e: Tensor) -> Iterator[Tensor]:
        """An iterator over the residual blocks' shifts (B, C), all made by one product."""
        layers = [m.emb_layers[1] for m in self.modules() if isinstance(m, ResBlock)]
        widths = [layer.out_features for layer in layers]
        return iter(modulation_gemm(silu(e), layers).split(widths, dim=1))

    def _context(self, condition: Condition) -> tuple[Tensor | None, Tensor | None]:
        """Tokens to attend to (B, M, K) and their numbers (B,) int32; None for all, or for none."""
        config = self.config
        if config.conditioning.semantic == "text":
            text, lengths = self.text_tokens(condition)
            lengths = None if lengths is None else lengths.to(torch.int32)
            return text.to(self.time_embed[0].weight.dtype), lengths
        if not config.tokens_width:
            return None, None
        return self.class_embedder(labels_of(condition, config.num_classes)), None

    def _initialise(self) -> None:
        """As published, which is torch's own but for the zeros above; control may start at zero."""
        asked = self.config.conditioning
        if self.config.sdxl_control and asked.control_zero:
            zeroed(self.label_emb[0][2])
        elif asked.control and not self.config.sdxl_control:
            self.control_embedder.initialise(asked.control_zero)


def _transformer(config: UNetConfig, level: int, depth: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.width(level),
        config.heads(level),
        depth,
        config.tokens_width,
        config.linear_projection,
    )


def _stage(stage: Stage, config: UNetConfig, *, upward: bool) -> Block:
    if stage.resample and not upward:
        return Block([Downsample(stage.outputs)])
    layers: list[nn.Module] = [ResBlock(stage.inputs, stage.outputs, config.time_width)]
    if stage.depth:
        layers.append(_transformer(config, stage.level, stage.depth))
    if stage.resample:
        layers.append(Upsample(stage.outputs))
    return Block(layers)


def _middle(config: UNetConfig) -> Block:
    level = len(config.channel_mult) - 1
    width, time = config.width(level), config.time_width
    transformer = _transformer(config, level, config.depth(level, middle=True))
    return Block([ResBlock(width, width, time), transformer, ResBlock(width, width, time)])
