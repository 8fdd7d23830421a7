"""MDTv2: the layout of the publication's repository; diffusers has no such class.

The names are ours. Each of their attentions also stores the index of its bias table, a buffer that
a model here computes: it is compared when read, and written with the rest.
"""

import torch
from torch import Tensor

from etude.models.mdt import MDTConfig

from .layout import Entry, same

_BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
_ENDS = (
    "x_embedder.proj",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)


def original_table(config: MDTConfig) -> list[Entry]:
    """Our names against those of the published checkpoints, without control."""
    grid = config.grid
    half = (config.depth - config.decode_layer) // 2
    table = [Entry(name, (name,)) for name in ("pos_embed", "decoder_pos_embed", "mask_token")]
    table += same("y_embedder.embedding_table", "y_embedder.embedding_table", "weight")
    for name in _ENDS:
        table += same(name, name)
    counts = {"en_inblocks": half, "en_outblocks": half, "de_blocks": config.decode_layer}
    for group, count in (counts | {"sideblocks": 1}).items():
        more = ("skip_linear",) if group in ("en_outblocks", "de_blocks") else ()
        for block in (f"{group}.{n}" for n in range(count)):
            for part in (*_BLOCK, *more):
                table += same(f"{block}.{part}", f"{block}.{part}")
            bias = f"{block}.attn.rel_pos_bias"
            table += same(bias, bias, "relative_position_bias_table")
            index = f"{bias}.relative_position_index"
            table.append(Entry("", (index,), make=lambda: relative_position_index(grid)))
    return table


def relative_position_index(grid: int) -> Tensor:
    """(N, N) int64: the bias table's row for tokens i and j of a square grid, row by row."""
    side = torch.arange(grid)
    apart = side[:, None] - side[None, :] + grid - 1
    rows, columns = apart[:, None, :, None], apart[None, :, None, :]
    return (rows * (2 * grid - 1) + columns).reshape(grid * grid, grid * grid)
