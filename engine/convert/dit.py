"""DiT: the layout of the publication's repository, which is ours, and that of diffusers.

diffusers replicates the two embedders into every block and splits the fused query, key and value;
its class's own norm_eps is 1e-5 where the publication's is 1e-6: build it with `norm_eps=1e-6`.
"""

from etude.core.errors import UserError
from etude.models.blocks import positions_2d
from etude.models.dit import DiTConfig

from .layout import Entry, same, stack

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_SHARED = (
    "input_size",
    "in_channels",
    "num_classes",
    "learn_sigma",
    "patch_size",
    "hidden_size",
    "depth",
    "num_heads",
)
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}


def diffusers_table(config: DiTConfig) -> list[Entry]:
    """Our names against those of diffusers' DiTTransformer2DModel.

    Raises:
        UserError: the model has parts that diffusers' has not.
    """
    plain = DiTConfig(**{name: getattr(config, name) for name in _SHARED})
    asked = config.conditioning
    if asked.semantic_path == "adaln":  # the published way
        asked = asked.model_copy(update={"semantic_path": "published"})
    # Where the weights lie depends on none of these.
    free = {"preset": "", "activation_checkpointing": False, "modulation_start": "zero"}
    if config.model_copy(update=free | {"conditioning": asked}) != plain:
        raise UserError(
            "diffusers' DiT is the published one: this model has control, another mlp_ratio or"
            " options of the modern variant; write layout: original"
        )
    blocks = [f"transformer_blocks.{n}" for n in range(config.depth)]
    grid = config.grid
    # diffusers computes the table of positions when it builds a model.
    table = [Entry("pos_embed", (), make=lambda: positions_2d(config.hidden_size, grid)[None])]
    for ours, theirs in _ENDS.items():
        table += same(ours, theirs)
    for ours, theirs in _EMBEDDERS.items():
        for kind in ("weight",) if "table" in ours else ("weight", "bias"):
            places = tuple(f"{block}.norm1.emb.{theirs}.{kind}" for block in blocks)
            table.append(Entry(f"{ours}.{kind}", places, "copies"))
    for n, block in enumerate(blocks):
        table += stack(f"blocks.{n}.attn.qkv", [f"{block}.attn1.to_{letter}" for letter in "qkv"])
        for ours, theirs in _BLOCK.items():
            table += same(f"blocks.{n}.{ours}", f"{block}.{theirs}")
    return table
