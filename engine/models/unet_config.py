"""Configuration of a U-Net: published shapes, the fields of a recipe, and the order of its blocks.

Called by `unet.py`, which says what the fields do, and by the conversion of names.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from etude.core.config import option

from .conditioning import FREQUENCIES
from .denoiser import DenoiserConfig

PRESETS: dict[str, dict[str, Any]] = {
    "ldm4": {  # cin256-v2: latents of 3 x 64 x 64
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 5),
        "attention_downsamplings": (2, 4, 8),
        "transformer_depth": (1,),
        "head_channels": 0,
        "num_heads": 1,
        "context_width": 512,
        "linear_projection": False,
    },
    "cin-f8": {  # ImageNet on latents of 4 x 32 x 32
        "model_channels": 256,
        "channel_mult": (1, 2, 4),
        "attention_downsamplings": (1, 2, 4),
        "transformer_depth": (1,),
        "head_channels": 32,
        "num_heads": 1,
        "context_width": 512,
        "linear_projection": False,
    },
    "imagenet-f8": {  # generative-models' ImageNet example, with SDXL's control
        "model_channels": 256,
        "channel_mult": (1, 2, 4),
        "attention_downsamplings": (1, 2, 4),
        "transformer_depth": (1,),
        "head_channels": 64,
        "num_heads": 1,
        "context_width": 1024,
        "linear_projection": False,
    },
    "sdxl": {
        "model_channels": 320,
        "channel_mult": (1, 2, 4),
        "attention_downsamplings": (2, 4),
        "transformer_depth": (1, 2, 10),
        "head_channels": 64,
        "num_heads": 1,
        "context_width": 2048,
        "linear_projection": True,
    },
}
PRESETS = {name: {"num_res_blocks": 2} | shape for name, shape in PRESETS.items()}
Preset = Literal[tuple(["", *PRESETS])]  # type: ignore[valid-type]


class UNetConfig(DenoiserConfig):
    """Shape of a U-Net; `preset` fills that of a published one (conditions and latents apart)."""

    presets: ClassVar = PRESETS

    family: Literal["unet"] = option("unet", "the kind of network")
    preset: Preset = option("", "a published shape such as ldm4; empty: the fields below")
    learn_sigma: bool = option(False, "also return a variance for every channel")
    model_channels: int = option(128, "channels of the first level", gt=0, multiple_of=32)
    channel_mult: tuple[int, ...] = option(
        (1, 2, 4), "channels of each level over model_channels; each level halves the size"
    )
    num_res_blocks: int = option(2, "residual blocks of a level on the way down", gt=0)
    attention_downsamplings: tuple[int, ...] = option(
        (1, 2, 4), "sizes that have attention: the latents' size over theirs; the middle always has"
    )
    transformer_depth: tuple[int, ...] = option(
        (1,), "blocks of each level's transformers, or one number for all levels"
    )
    head_channels: int = option(64, "channels of an attention head; 0: num_heads heads", ge=0)
    num_heads: int = option(1, "attention heads where head_channels is 0", gt=0)
    context_width: int = option(
        512, "channels of a class's tokens in attention; a text has text_width", gt=0
    )
    linear_projection: bool = option(
        False, "projections of a transformer are linear maps (SDXL), not 1 x 1 convolutions"
    )
    channels_last: bool = option(
        True, "feature maps hold channels last, as GPU kernels prefer", affects_result=False
    )

    @model_validator(mode="after")
    def _check(self) -> "UNetConfig":
        levels, asked = len(self.channel_mult), self.conditioning
        if levels == 0 or min(self.channel_mult) < 1:
            raise ValueError(
                "channel_mult needs a number above 0 for each level: give at least one"
            )
        if self.input_size % 2 ** (levels - 1):
            raise ValueError(
                f"input_size={self.input_size} is not a multiple of {2 ** (levels - 1)}, which"
                f" {levels} levels divide it by: change input_size or channel_mult"
            )
        if len(self.transformer_depth) not in (1, levels) or min(self.transformer_depth) < 1:
            raise ValueError(
                f"transformer_depth={self.transformer_depth} needs one number above 0, or one for"
                f" each of {levels} levels"
            )
        steps = [2**level for level in range(levels)]
        wrong = [step for step in self.attention_downsamplings if step not in steps]
        if wrong:
            raise ValueError(
                f"attention_downsamplings={wrong[0]} is not a size of this network: its levels"
                f" divide by {', '.join(map(str, steps))}"
            )
        for level in range(levels):
            width, unit = self.width(level), self.head_channels or self.num_heads
            if (self.depth(level) or level == levels - 1) and width % unit:
                name = "head_channels" if self.head_channels else "num_heads"
                raise ValueError(f"{name}={unit} does not divide the {width} channels of a level")
        if asked.semantic == "text" and asked.semantic_path == "adaln":
            raise ValueError(
                "a U-Net takes a text through attention: set semantic_path: published or attention"
            )
        if asked.pooled_width and asked.semantic_path == "attention":
            raise ValueError(
                "pooled_width has no effect with semantic_path: attention: leave it out, or set"
                " semantic_path: published"
            )
        return self

    @property
    def time_width(self) -> int:
        """Channels of the embedding of time, pooled text and control."""
        return 4 * self.model_channels

    @property
    def tokens_width(self) -> int:
        """Channels of the context's tokens; 0 where there is no context."""
        if self.conditioning.semantic == "text":
            return self.conditioning.text_width
        return 0 if self.conditioning.semantic_path == "adaln" else self.context_width

    @property
    def sdxl_control(self) -> bool:
        """Whether control goes through `label_emb`, exactly as in SDXL."""
        asked = self.conditioning
        constant = all(control.exponent == 0 for control in asked.control)
        return bool(asked.control) and asked.control_embedding == "concatenated" and constant

    @property
    def vector_width(self) -> int:
        """Channels that enter `label_emb`; 0 where there is none."""
        control = len(self.conditioning.control) * FREQUENCIES if self.sdxl_control else 0
        return self.conditioning.pooled_width + control

    def width(self, level: int) -> int:
        return self.model_channels * self.channel_mult[level]

    def heads(self, level: int) -> int:
        return self.width(level) // self.head_channels if self.head_channels else self.num_heads

    def depth(self, level: int, *, middle: bool = False) -> int:
        """Blocks of the transformers of a level; 0 where it has no attention."""
        if not middle and 2**level not in self.attention_downsamplings:
            return 0
        depths = self.transformer_depth
        return depths[level] if len(depths) > 1 else depths[0]


@dataclass(frozen=True)
class Stage:
    """One entry of `input_blocks` (after the first convolution) or of `output_blocks`.

    Attributes:
        level: the level it belongs to; 0 has the latents' size.
        index: its number within the level.
        inputs, outputs: channels; on the way up the inputs hold those of the way down.
        depth: blocks of the transformer after the residual block; 0: no transformer.
        resample: on the way down it is a halving and nothing else; on the way up it ends doubling.
    """

    level: int
    index: int
    inputs: int
    outputs: int
    depth: int
    resample: bool


def stages(config: UNetConfig) -> tuple[list[Stage], list[Stage]]:
    """The way down and the way up; also read by the conversion of names."""
    down, up, blocks = [], [], config.num_res_blocks
    widths, last = [config.model_channels], len(config.channel_mult) - 1
    for level in range(last + 1):
        for n in range(blocks):
            width = config.width(level)
            down.append(Stage(level, n, widths[-1], width, config.depth(level), False))
            widths.append(width)
        if level < last:
            down.append(Stage(level, blocks, widths[-1], widths[-1], 0, True))
            widths.append(widths[-1])
    channels = widths[-1]
    for level in range(last, -1, -1):
        for n in range(blocks + 1):
            width, double = config.width(level), level > 0 and n == blocks
            inputs = channels + widths.pop()
            up.append(Stage(level, n, inputs, width, config.depth(level), double))
            channels = width
    return down, up
