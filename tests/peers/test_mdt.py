"""MDTv2 against the publication's mathematics in plain torch float64, with the same random weights.

diffusers has no such class. The peer is written from Gao et al. 2023 and from what its public
implementation computes, picture by picture, with Python's lists for what is kept. It shares no code
with the model and takes its weights by the published names.
"""

import copy
import math
import re

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.models.mdt import MDT, MDTConfig

GRID, PATCH, HEADS, IN, DECODE = 4, 2, 4, 2, 2
CONFIG = MDTConfig(
    input_size=GRID * PATCH,
    patch_size=PATCH,
    in_channels=4,
    hidden_size=96,
    depth=2 * IN + DECODE,
    decode_layer=DECODE,
    num_heads=HEADS,
    num_classes=10,
)
# The kept tokens of each picture, as many in each: a third to a half are masked in training.
KEEP = [
    [0, 1, 3, 6, 7, 8, 10, 12, 15],
    [2, 3, 4, 5, 6, 9, 11, 13, 14],
    [0, 4, 5, 7, 8, 9, 10, 11, 12],
]
ALL = list(range(GRID * GRID))


class Peer:
    """The network as a function of its weights by name."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def normed(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def attention(self, name: str, x: Tensor, places: list[int]) -> Tensor:
        queries, keys, values = self.linear(f"{name}.qkv", x).chunk(3, dim=-1)
        table = self.w[f"{name}.rel_pos_bias.relative_position_bias_table"]
        rows = [
            [
                (i // GRID - j // GRID + GRID - 1) * (2 * GRID - 1) + i % GRID - j % GRID + GRID - 1
                for j in places
            ]
            for i in places
        ]
        bias = table[torch.tensor(rows)]
        heads = []
        for h, (q, k, v) in enumerate(
            zip(
                queries.chunk(HEADS, -1),
                keys.chunk(HEADS, -1),
                values.chunk(HEADS, -1),
                strict=True,
            )
        ):
            scores = q @ k.T / math.sqrt(q.shape[-1]) + bias[:, :, h]
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ v)
        return self.linear(f"{name}.proj", torch.cat(heads, -1))

    def block(
        self, name: str, x: Tensor, c: Tensor, places: list[int], skip: Tensor | None = None
    ) -> Tensor:
        if skip is not None:
            x = self.linear(f"{name}.skip_linear", torch.cat([x, skip], -1))
        six = self.linear(f"{name}.adaLN_modulation.1", c * c.sigmoid()).chunk(6)
        y = self.normed(x, six[0], six[1])
        x = x + six[2] * self.attention(f"{name}.attn", y, places)
        u = self.linear(f"{name}.mlp.fc1", self.normed(x, six[3], six[4]))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        return x + six[5] * self.linear(f"{name}.mlp.fc2", u)

    def picture(self, x: Tensor, t: float, label: int, keep: list[int] | None) -> Tensor:
        """One picture (C, H, W) to (2 C, H, W)."""
        patches = torch.stack(
            [
                x[:, PATCH * (i // GRID) :, PATCH * (i % GRID) :][:, :PATCH, :PATCH].flatten()
                for i in ALL
            ]
        )
        kernel = self.w["x_embedder.proj.weight"].flatten(1)
        tokens = patches @ kernel.T + self.w["x_embedder.proj.bias"] + self.w["pos_embed"][0]
        angles = t * torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=x.dtype)
        c = self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        c = self.linear("t_embedder.mlp.2", c * c.sigmoid())
        c = c + self.w["y_embedder.embedding_table.weight"][label]

        seen = ALL if keep is None else keep
        z, given = tokens[seen], []
        for n in range(IN):
            z = self.block(f"en_inblocks.{n}", z, c, seen)
            given.append(z)
        for n in range(IN):
            z = self.block(f"en_outblocks.{n}", z, c, seen, skip=given[IN - 1 - n])
        if keep is not None:
            token = self.w["mask_token"][0, 0]
            z = torch.stack([z[keep.index(i)] if i in keep else token for i in ALL])
        z = z + self.w["decoder_pos_embed"][0]
        if keep is not None:
            side = self.block("sideblocks.0", z, c, ALL)
            z = torch.stack([z[i] if i in keep else side[i] for i in ALL])
        for n in range(DECODE):
            z = self.block(f"de_blocks.{n}", z, c, ALL, skip=tokens)
        two = self.linear("final_layer.adaLN_modulation.1", c * c.sigmoid()).chunk(2)
        out = self.linear("final_layer.linear", self.normed(z, *two))
        out = out.view(GRID, GRID, PATCH, PATCH, -1)  # row, column, row within, column within
        return out.permute(4, 0, 2, 1, 3).reshape(-1, GRID * PATCH, GRID * PATCH)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, keep: list | None) -> Tensor:
        keeps = keep or [None] * len(x)
        rows = zip(x.double(), t.tolist(), labels.tolist(), keeps, strict=True)
        return torch.stack([self.picture(*row) for row in rows])


@pytest.fixture(scope="module", params=[0.02, 0.1])
def models(request: pytest.FixtureRequest) -> tuple[MDT, Peer]:
    ours, generator, weights = MDT(CONFIG), torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for name, value in ours.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * request.param)
            weights[name] = value.double().requires_grad_()
    return ours, Peer(weights)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    # In float32 a time near 1000 leaves its angles four digits less than the rest has.
    return x, torch.tensor([0.0, 61.0, 417.0]), torch.tensor([0, 9, 10])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_and_gradients_agree(
    models: tuple, backend: str, dtype: torch.dtype, keep: list | None
) -> None:
    ours, peer = copy.deepcopy(models[0]).to(dtype), models[1]
    x, t, labels = batch()
    condition = {"labels": labels} | ({"keep": torch.tensor(keep)} if keep else {})
    cotangent = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    with kernels.use_backend(backend):
        output = ours(x, t.to(dtype), condition)
        (output * cotangent).sum().backward()
    for weight in peer.w.values():
        weight.grad = None
    expected = peer(x, t, labels, keep)
    (expected * cotangent).sum().backward()
    assert expected.std() > 0.1
    exact = dtype == torch.float64
    assert relative(output, expected) < (1e-12 if exact else 1e-5)
    for name, value in ours.named_parameters():
        if keep is None and name.startswith(("sideblocks", "mask_token")):
            assert value.grad is None and peer.w[name].grad is None
        else:
            error = relative(value.grad, peer.w[name].grad)
            assert error < (1e-11 if exact else 1e-4), name


def test_a_perturbed_weight_of_each_kind_is_noticed(models: tuple) -> None:
    ours, peer = copy.deepcopy(models[0]).double(), models[1]
    x, t, labels = batch()
    condition = {"labels": labels, "keep": torch.tensor(KEEP)}
    kinds = {re.sub(r"blocks\.\d+", "blocks", name): name for name in peer.w}
    assert len(kinds) == 14 + 2 * 11 + 2 * 13  # two kinds of block have a skip
    with torch.no_grad():
        expected = peer(x, t, labels, KEEP)
        for name in kinds.values():
            parameter = ours.get_parameter(name)
            kept = parameter.clone()
            parameter.view(-1)[::7] += 0.02
            worse = relative(ours(x, t.double(), condition), expected)
            parameter.copy_(kept)
            # Attention of nearly equal weights moves little; agreement is to 1e-12.
            assert worse > 1e-9, name
