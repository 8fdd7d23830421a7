"""PixArt-alpha: the layout of the publication's repository, which is ours, and that of diffusers.

diffusers splits the fused queries, keys and values, computes the table of positions when it builds
a model (give it our `interpolation_scale`; its base_size is that of a new model), and has no null
text: its pipeline encodes an empty prompt instead. What we write holds ours too, under our name,
which diffusers' `from_pretrained` reports and leaves: take it out before a strict load over there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.models.pixart import PixArtConfig, positions

from .layout import Entry, published_mlp, same, stack

_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_MICRO = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_TABLE = "scale_shift_table"
NULL = "y_embedder.y_embedding"


def diffusers_table(config: PixArtConfig, null: Tensor | None = None) -> list[Entry]:
    """Our names against those of diffusers' PixArtTransformer2DModel.

    Args:
        config: of a model that is asked by text.
        null: (text_tokens, text_width), our null text when theirs are read: an empty prompt's
            features from the text encoder; zeros if not given.

    Raises:
        UserError: the model is asked by class, of which diffusers' has no table, or has another
            mlp_ratio than diffusers' has.
    """
    given = config.conditioning
    if given.semantic != "text":
        raise UserError("diffusers' PixArt is asked by text alone: this model has classes")
    published_mlp(config)
    table = [
        Entry("pos_embed", (), make=lambda: positions(config)),
        Entry(NULL, (), make=_null(null, given.text_tokens, given.text_width)),
        Entry(f"final_layer.{_TABLE}", (_TABLE,)),
    ]
    for ours, theirs in (_ENDS | (_MICRO if config.micro_conditions else {})).items():
        table += same(ours, theirs)
    for n in range(config.depth):
        block, peer = f"blocks.{n}", f"transformer_blocks.{n}"
        table.append(Entry(f"{block}.{_TABLE}", (f"{peer}.{_TABLE}",)))
        table += stack(f"{block}.attn.qkv", [f"{peer}.attn1.to_{letter}" for letter in "qkv"])
        table += stack(f"{block}.cross_attn.kv_linear", [f"{peer}.attn2.to_{i}" for i in "kv"])
        for ours, theirs in _BLOCK.items():
            table += same(f"{block}.{ours}", f"{peer}.{theirs}")
    return table


def with_null(table: list[Entry]) -> list[Entry]:
    """The table of a file of ours, which holds our null text."""
    return [Entry(NULL, (NULL,)) if entry.ours == NULL else entry for entry in table]


def _null(null: Tensor | None, tokens: int, width: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        return torch.zeros(tokens, width) if null is None else null

    return make
