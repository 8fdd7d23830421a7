"""The DiT against diffusers' DiTTransformer2DModel, with the same random weights.

One published detail is set in the peer: its time frequencies are spaced over half - 1 intervals,
those of the original DiT (`timestep_embedding`, exponent -log(10000) i / half) over half.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.convert.diffusers_config import diffusers_config
from etude.models.dit import DiT, DiTConfig

DiTTransformer2DModel = pytest.importorskip("diffusers").DiTTransformer2DModel

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=4, hidden_size=96, depth=3, num_heads=4, num_classes=10
)
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
EMBEDDERS = {  # replicated into every block over there
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def peer_names(name: str) -> list[str]:
    """Where a parameter of ours lives in the peer; three names for a fused query-key-value."""
    module, kind = name.rsplit(".", 1)
    if module in ENDS:
        return [f"{ENDS[module]}.{kind}"]
    if module in EMBEDDERS:
        blocks = range(CONFIG.depth)
        return [f"transformer_blocks.{n}.norm1.emb.{EMBEDDERS[module]}.{kind}" for n in blocks]
    _, n, part = module.split(".", 2)
    if part == "attn.qkv":
        return [f"transformer_blocks.{n}.attn1.to_{letter}.{kind}" for letter in "qkv"]
    return [f"transformer_blocks.{n}.{BLOCK[part]}.{kind}"]


@pytest.fixture(scope="module", params=[0.02, 0.1])
def models(request: pytest.FixtureRequest) -> tuple[DiT, torch.nn.Module]:
    ours = DiT(CONFIG)
    # Its label dropout is for training.
    peer = DiTTransformer2DModel.from_config(diffusers_config(CONFIG)).eval()
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    generator = torch.Generator().manual_seed(0)
    state, used = peer.state_dict(), set()
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if name == "pos_embed":
                continue
            value.copy_(torch.randn(value.shape, generator=generator) * request.param)
            targets = peer_names(name)
            parts = value.chunk(3) if "attn.qkv" in name else [value] * len(targets)
            for target, part in zip(targets, parts, strict=True):
                state[target].copy_(part)
                used.add(target)
    assert used == {name for name in state if name != "pos_embed.pos_embed"}
    return ours, peer


def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 417, 999]), torch.tensor([0, 9, 10])


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_and_gradients_agree(models: tuple, backend: str) -> None:
    ours, peer = models
    x, t, labels = batch()
    cotangent = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    with kernels.use_backend(backend):
        output = ours(x, t.float(), {"labels": labels})
        ours.zero_grad()
        (output * cotangent).sum().backward()
    expected = peer(x, timestep=t, class_labels=labels).sample
    assert relative(output, expected) < 1e-5
    peer.zero_grad()
    (expected * cotangent).sum().backward()
    theirs = dict(peer.named_parameters())
    for name, value in ours.named_parameters():
        if name == "pos_embed":
            assert value.grad is None
            continue
        gradients = [theirs[target].grad for target in peer_names(name)]
        if "attn.qkv" in name:
            gradient = torch.cat(gradients)
        else:  # replicas each see a share of the gradient; the last layer uses the first one
            gradient = torch.stack([g for g in gradients if g is not None]).sum(0)
        assert relative(value.grad, gradient) < 1e-4, name


@pytest.mark.parametrize(
    "name", ["blocks.2.attn.qkv.weight", "t_embedder.mlp.0.bias", "final_layer.linear.weight"]
)
def test_a_perturbed_weight_is_noticed(models: tuple, name: str) -> None:
    ours, peer = models
    x, t, labels = batch()
    expected = peer(x, timestep=t, class_labels=labels).sample
    parameter = dict(ours.named_parameters())[name]
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[::7] += 0.02
        worse = relative(ours(x, t.float(), {"labels": labels}), expected)
        parameter.copy_(kept)
    assert worse > 5e-5


def test_position_table_agrees(models: tuple) -> None:
    ours, peer = models
    torch.testing.assert_close(ours.pos_embed.data, peer.pos_embed.pos_embed, rtol=0, atol=1e-6)
