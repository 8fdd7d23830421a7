"""mmDiT: the layout of Stability's repositories, whose names are ours, and that of diffusers.

Stability's files hold these names behind `model.diffusion_model.`, beside an autoencoder. Their
null text is an encoded empty prompt and no tensor: what is read has zeros there.

diffusers splits every fused query, key and value, and takes scale before shift where a norm has two
vectors: in the last block's text stream and at the end. Its table of positions is made otherwise
than the publication's but always stored, so that the stored one counts.
"""

import torch

from etude.core.errors import UserError
from etude.models.mmdit import MMDiT, MMDiTConfig

from .layout import Entry, null_text, published_mlp, same, stack

PREFIX = "model.diffusion_model."
_NULL = "text_tokens.null"
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_IMAGE = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_TEXT = {
    "adaLN_modulation.1": "norm1_context.linear",
    "attn.proj": "attn.to_add_out",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
}


def original_table(config: MMDiTConfig) -> list[Entry]:
    """Our names against those of the published files, without their prefix."""
    with torch.device("meta"):
        names = MMDiT(config).state_dict()
    return null_text(config.conditioning) + [
        Entry(name, (name,)) for name in names if name != _NULL
    ]


def diffusers_table(config: MMDiTConfig) -> list[Entry]:
    """Our names against those of diffusers' SD3Transformer2DModel.

    Raises:
        UserError: the model is asked otherwise, or has another mlp_ratio.
    """
    if config.conditioning.semantic != "text" or not config.has_vector:
        raise UserError(
            "diffusers' SD3Transformer2DModel knows a text with a pooled vector only: this model"
            f" has semantic: {config.conditioning.semantic},"
            f" semantic_path: {config.conditioning.semantic_path}"
        )
    published_mlp(config)
    table = [*null_text(config.conditioning), Entry("pos_embed", ("pos_embed.pos_embed",))]
    for ours, theirs in _ENDS.items():
        table += same(ours, theirs)
    table += _swapped("final_layer.adaLN_modulation.1", "norm_out.linear")
    for n in range(config.depth):
        table += _block(config, n)
    return table


def _block(config: MMDiTConfig, n: int) -> list[Entry]:
    theirs = f"transformer_blocks.{n}"
    image, text = f"joint_blocks.{n}.x_block", f"joint_blocks.{n}.context_block"
    table = stack(f"{image}.attn.qkv", [f"{theirs}.attn.to_{letter}" for letter in "qkv"])
    table += stack(f"{text}.attn.qkv", [f"{theirs}.attn.add_{letter}_proj" for letter in "qkv"])
    for part, name in _IMAGE.items():
        table += same(f"{image}.{part}", f"{theirs}.{name}")
    if n == config.depth - 1:
        table += _swapped(f"{text}.adaLN_modulation.1", f"{theirs}.norm1_context.linear")
    else:
        for part, name in _TEXT.items():
            table += same(f"{text}.{part}", f"{theirs}.{name}")
    dual = n < config.dual_attention_layers
    if dual:
        table += stack(f"{image}.attn2.qkv", [f"{theirs}.attn2.to_{letter}" for letter in "qkv"])
        table += same(f"{image}.attn2.proj", f"{theirs}.attn2.to_out.0")
    if config.qk_norm == "rms":
        for letter in "qk":
            table += same(f"{image}.attn.ln_{letter}", f"{theirs}.attn.norm_{letter}", "weight")
            table += same(
                f"{text}.attn.ln_{letter}", f"{theirs}.attn.norm_added_{letter}", "weight"
            )
            if dual:
                name = f"{theirs}.attn2.norm_{letter}"
                table += same(f"{image}.attn2.ln_{letter}", name, "weight")
    return table


def _swapped(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), "swap") for kind in ("weight", "bias")]
