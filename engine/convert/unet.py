"""U-Net: the published checkpoints of latent-diffusion and SDXL, and diffusers' layout.

Our names are those of the network in the published repositories, where a whole checkpoint puts
`model.diffusion_model.` before them and holds more beside it (an autoencoder, a text encoder):
`original_table` is about the tensors under `PUBLISHED` alone. diffusers numbers by level instead of
by block; built with our `linear_projection` as its `use_linear_projection` it has our shapes.

`OURS` are modules that neither the published network nor diffusers' class holds. They keep their
names: take them out before a strict `load_state_dict` over there, and give it what they compute.
The null text alone is not written: it is zeros.
"""

from etude.core.errors import UserError
from etude.models.unet_config import Stage, UNetConfig, stages

from .layout import Entry, null_text, same

PUBLISHED = ("model.diffusion_model.", "cond_stage_model.embedding.")
OURS = ("class_embedder.", "control_embedder.", "text_tokens.")

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_BIASED = (
    "norm1",
    "norm2",
    "norm3",
    "attn1.to_out.0",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)
_UNBIASED = tuple(
    f"{attention}.to_{letter}" for attention in ("attn1", "attn2") for letter in "qkv"
)


def original_table(config: UNetConfig) -> list[Entry]:
    """Our names against those of a published checkpoint, of which it takes `PUBLISHED`.

    The class embedding of cin256-v2 has a row for no class, as ours has.
    """
    table = []
    for entry in _network(config):
        table.append(Entry(entry.ours, (PUBLISHED[0] + entry.ours,)))
    for name in _beside(config):
        published = name.replace("class_embedder.embedding_table.", PUBLISHED[1])
        table.append(Entry(name, (published,)))
    return table + null_text(config.conditioning)


def diffusers_table(config: UNetConfig) -> list[Entry]:
    """Our names against those of diffusers' UNet2DConditionModel, and `OURS` unchanged."""
    beside = [Entry(name, (name,)) for name in _beside(config)]
    return _network(config) + beside + null_text(config.conditioning)


def _network(config: UNetConfig) -> list[Entry]:
    """Ours against diffusers', without what lies beside the network."""
    if not config.tokens_width:
        raise UserError(
            "other U-Nets attend to a context: set semantic_path: published or attention"
        )
    table = []
    for ours, theirs in _ENDS.items():
        table += same(ours, theirs)
    if config.vector_width:
        # Pooled text and sizes together are an addition over there, either alone is a class.
        both = config.sdxl_control and config.conditioning.pooled_width
        place = "add_embedding" if both else "class_embedding"
        for n, layer in ((0, "linear_1"), (2, "linear_2")):
            table += same(f"label_emb.0.{n}", f"{place}.{layer}")
    down, up = stages(config)
    for n, stage in enumerate(down, start=1):
        place = f"down_blocks.{stage.level}"
        if stage.resample:
            table += same(f"input_blocks.{n}.0.op", f"{place}.downsamplers.0.conv")
        else:
            table += _stage(f"input_blocks.{n}", place, stage)
    last = len(config.channel_mult) - 1
    depth = config.depth(last, middle=True)
    for ours, theirs in (("middle_block.0", "resnets.0"), ("middle_block.2", "resnets.1")):
        table += _residual(ours, f"mid_block.{theirs}", same_width=True)
    table += _transformer("middle_block.1", "mid_block.attentions.0", depth)
    for n, stage in enumerate(up):
        place = f"up_blocks.{last - stage.level}"
        table += _stage(f"output_blocks.{n}", place, stage)
        if stage.resample:
            at = 2 if stage.depth else 1
            table += same(f"output_blocks.{n}.{at}.conv", f"{place}.upsamplers.0.conv")
    return table


def _stage(ours: str, theirs: str, stage: Stage) -> list[Entry]:
    same_width = stage.inputs == stage.outputs
    table = _residual(f"{ours}.0", f"{theirs}.resnets.{stage.index}", same_width=same_width)
    if stage.depth:
        table += _transformer(f"{ours}.1", f"{theirs}.attentions.{stage.index}", stage.depth)
    return table


def _residual(ours: str, theirs: str, *, same_width: bool) -> list[Entry]:
    table = []
    for mine, other in _RESIDUAL.items():
        table += same(f"{ours}.{mine}", f"{theirs}.{other}")
    if not same_width:
        table += same(f"{ours}.skip_connection", f"{theirs}.conv_shortcut")
    return table


def _transformer(ours: str, theirs: str, depth: int) -> list[Entry]:
    table = []
    for end in ("norm", "proj_in", "proj_out"):
        table += same(f"{ours}.{end}", f"{theirs}.{end}")
    for k in range(depth):
        block = f"transformer_blocks.{k}"
        for layer in _BIASED:
            table += same(f"{ours}.{block}.{layer}", f"{theirs}.{block}.{layer}")
        for layer in _UNBIASED:
            table += same(f"{ours}.{block}.{layer}", f"{theirs}.{block}.{layer}", "weight")
    return table


def _beside(config: UNetConfig) -> list[str]:
    """Names under `OURS`, the null text apart."""
    asked, names = config.conditioning, []
    if asked.semantic == "class":
        names.append("class_embedder.embedding_table.weight")
    elif asked.text_padding == "learned":
        names.append("text_tokens.padding")
    if asked.control and not config.sdxl_control:
        count = 1 if asked.control_embedding == "concatenated" else len(asked.control)
        for k in range(count):
            for layer in ("0", "2"):
                for kind in ("weight", "bias"):
                    names.append(f"control_embedder.mlps.{k}.{layer}.{kind}")
    return names
