"""The config.json with which diffusers' classes take what `write_denoiser` writes; for `exporting`.

What diffusers cannot be told: its DiT's sines of the time use other frequencies unless
`time_proj.downscale_freq_shift` is set to 0 in each block, and modules under `unet.OURS` are not
its own.
"""

from typing import Any

from etude.core.errors import UserError
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
