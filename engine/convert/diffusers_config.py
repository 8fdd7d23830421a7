"""The config.json with which diffusers' classes take what `write_denoiser` writes; for `exporting`.

For `stable_diffusion` also the way back, of a U-Net that is asked by text.

What diffusers cannot be told: its DiT's sines of the time use other frequencies unless
`time_proj.downscale_freq_shift` is set to 0 in each block, and modules under `unet.OURS` are not
its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etude.core.errors import UserError
from etude.models.conditioning import FREQUENCIES, ConditioningConfig, ControlConfig
from etude.models.dit import DiTConfig
from etude.models.mmdit import MMDiTConfig
from etude.models.pixart import PixArtConfig
from etude.models.unet_config import UNetConfig


def diffusers_config(config: Any) -> dict[str, Any]:
    """The fields of the class that holds such a model in diffusers' layout, `_class_name` first.

    Raises:
        UserError: the family has no class there.
    """
    for kind, (name, fields) in _CLASSES.items():
        if isinstance(config, kind):
            shared = {
                "sample_size": config.input_size,
                "in_channels": config.in_channels,
                "out_channels": config.out_channels,
            }
            return {"_class_name": name} | shared | fields(config)
    raise UserError(f"diffusers has no class for family {config.family}: write layout original")


def _dit(config: DiTConfig) -> dict[str, Any]:
    return _transformer(config) | {"num_embeds_ada_norm": config.num_classes, "norm_eps": 1e-6}


def _pixart(config: PixArtConfig) -> dict[str, Any]:
    # Theirs has no base_size: what it stretches is part of the scale.
    stretch = config.grid / (config.base_size or config.grid)
    return _transformer(config) | {
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.conditioning.text_width,
        "interpolation_scale": stretch * config.interpolation_scale,
        "use_additional_conditions": config.micro_conditions,
    }


def _mmdit(config: MMDiTConfig) -> dict[str, Any]:
    return _transformer(config) | {
        "caption_projection_dim": config.hidden_size,
        "joint_attention_dim": config.conditioning.text_width,
        "pooled_projection_dim": config.conditioning.pooled_width,
        "pos_embed_max_size": config.position_table or config.grid,
        "dual_attention_layers": list(range(config.dual_attention_layers)),
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
    }


def _transformer(config: DiTConfig | PixArtConfig | MMDiTConfig) -> dict[str, Any]:
    return {
        "patch_size": config.patch_size,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.hidden_size // config.heads,
    }


def _unet(config: UNetConfig) -> dict[str, Any]:
    levels = range(len(config.channel_mult))
    kinds = ["CrossAttn" if config.depth(level) else "" for level in levels]
    fields = {
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "block_out_channels": [config.width(level) for level in levels],
        "layers_per_block": config.num_res_blocks,
        # Its middle takes the last one; a level without attention takes none.
        "transformer_layers_per_block": [config.depth(level, middle=True) for level in levels],
        "attention_head_dim": [config.heads(level) for level in levels],  # their name for heads
        "cross_attention_dim": config.tokens_width,
        "use_linear_projection": config.linear_projection,
    }
    if config.conditioning.pooled_width and config.sdxl_control:
        fields |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    elif config.vector_width:
        fields["class_embed_type"] = "projection"
    if config.vector_width:
        fields["projection_class_embeddings_input_dim"] = config.vector_width
    return fields


_CLASSES = {
    DiTConfig: ("DiTTransformer2DModel", _dit),
    MMDiTConfig: ("SD3Transformer2DModel", _mmdit),
    PixArtConfig: ("PixArtTransformer2DModel", _pixart),
    UNetConfig: ("UNet2DConditionModel", _unet),
}

# What `add_embedding` of Stable Diffusion XL is told beside the pooled text, in its order.
SDXL_SIZES = ("height", "width", "crop_top", "crop_left", "target_height", "target_width")
# Fields of a UNet2DConditionModel that ours has at one value only: the class's default.
_ONLY = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
# Without effect on what a trained network computes: training, half precision, other embeddings.
_IDLE = ("dropout", "upcast_attention", "addition_embed_type_num_heads", "addition_time_embed_dim")
_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
}
_PER_LEVEL = ("attention_head_dim", "transformer_layers_per_block")


def unet_config(stated: Mapping[str, Any], where: str | Path, *, text_tokens: int) -> UNetConfig:
    """Our U-Net of a UNet2DConditionModel that is asked by text: Stable Diffusion 1, 2 and XL.

    Args:
        stated: its config.json; a field that is absent has the class's default.
        where: what messages call it.
        text_tokens: length of the padded text, which diffusers does not state.

    Raises:
        UserError: a field asks for something that our U-Net does not have.
    """
    asked = _DEFAULTS | {k: v for k, v in stated.items() if not k.startswith("_")}
    # What they call the width of a head is the number of heads, unless both are stated.
    asked["attention_head_dim"] = asked.pop("num_attention_heads", None) or asked[_PER_LEVEL[0]]
    try:
        for name in _PER_LEVEL:
            if isinstance(asked[name], int):
                asked[name] = [asked[name]] * len(asked["block_out_channels"])
        config = _text_unet(asked, text_tokens)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).splitlines()[:3])
        raise UserError(
            f"{where} describes no U-Net of Stable Diffusion ({reason}): copy the folder again"
        ) from None
    held = _ONLY | diffusers_config(config)
    for name, value in asked.items():
        value = list(value) if isinstance(value, tuple) else value
        if value != held.get(name) and (name in held or value) and name not in _IDLE:
            raise UserError(
                f"{where} sets {name} to {value}, which is none of Stable Diffusion's U-Nets that"
                " draw from a text alone: name another folder"
            )
    return config


def _text_unet(asked: Mapping[str, Any], text_tokens: int) -> UNetConfig:
    """As near as ours comes to the fields of theirs."""
    widths, heads = asked["block_out_channels"], asked["attention_head_dim"]
    attends = [name.startswith("CrossAttn") for name in asked["down_block_types"]]
    depths = tuple(asked["transformer_layers_per_block"])
    alike = len(set(heads)) == 1
    conditioning = {"text_tokens": text_tokens, "text_width": asked["cross_attention_dim"]}
    if asked.get("addition_embed_type") == "text_time":
        inputs = asked["projection_class_embeddings_input_dim"]
        conditioning["pooled_width"] = inputs - len(SDXL_SIZES) * FREQUENCIES
        conditioning["control"] = [ControlConfig(name=name, exponent=0) for name in SDXL_SIZES]
        conditioning["control_embedding"] = "concatenated"
    return UNetConfig(
        input_size=asked["sample_size"],
        in_channels=asked["in_channels"],
        learn_sigma=asked["out_channels"] == 2 * asked["in_channels"],
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=asked["layers_per_block"],
        attention_downsamplings=tuple(2**level for level, a in enumerate(attends) if a),
        transformer_depth=depths,
        head_channels=0 if alike else widths[0] // heads[0],
        num_heads=heads[0] if alike else 1,
        linear_projection=asked["use_linear_projection"],
        conditioning=ConditioningConfig(semantic="text", **conditioning),
    )
