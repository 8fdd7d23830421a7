"""The mmDiT against diffusers' SD3Transformer2DModel, with the same random weights.

The three published kinds: Stable Diffusion 3, 3.5 (queries and keys normalised) and 3.5 medium
(the picture also attends to itself alone in the first blocks).
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from etude import kernels
from etude.convert.diffusers_config import diffusers_config
from etude.convert.layout import Entry, to_ours, to_theirs
from etude.convert.mmdit import diffusers_table, original_table
from etude.core.errors import UserError
from etude.models.conditioning import ConditioningConfig
from etude.models.mmdit import MMDiT, MMDiTConfig

SD3Transformer2DModel = pytest.importorskip("diffusers").SD3Transformer2DModel

TEXT = ConditioningConfig(semantic="text", text_tokens=6, text_width=20, pooled_width=12)
KINDS = {
    "sd3": {},
    "sd3.5": {"qk_norm": "rms"},
    "sd3.5-medium": {"qk_norm": "rms", "dual_attention_layers": 2},
}


def config_of(kind: str, **changes) -> MMDiTConfig:
    shape = dict(input_size=8, hidden_size=64, depth=3, num_heads=4, position_table=9)
    return MMDiTConfig(conditioning=TEXT, **shape | KINDS[kind] | changes)


def peer_of(config: MMDiTConfig) -> nn.Module:
    return SD3Transformer2DModel.from_config(diffusers_config(config))


class Pair(NamedTuple):
    ours: MMDiT
    peer: nn.Module
    table: list[Entry]


def randomised(config: MMDiTConfig, spread: float) -> MMDiT:
    model = MMDiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            centre = 1.0 if ".ln_" in name else 0.0
            value.copy_(torch.randn(value.shape, generator=generator) * spread + centre)
    return model


def pair_of(config: MMDiTConfig, spread: float) -> Pair:
    ours, table, peer = randomised(config, spread), diffusers_table(config), peer_of(config)
    peer.load_state_dict(to_theirs(ours.state_dict(), table), strict=True)
    return Pair(ours, peer, table)


@pytest.fixture(
    scope="module",
    params=[(kind, spread) for kind in KINDS for spread in (0.02, 0.1)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def pair(request: pytest.FixtureRequest) -> Pair:
    kind, spread = request.param
    return pair_of(config_of(kind), spread)


def batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (
        torch.randn(shape, generator=generator) for shape in ((3, 4, 8, 8), (3, 6, 20), (3, 12))
    )
    return x, torch.tensor([0.0, 417.25, 1000.0]), {"text": text, "pooled": pooled}


def run_peer(peer: nn.Module) -> Tensor:
    x, t, condition = batch()
    return peer(
        hidden_states=x,
        encoder_hidden_states=condition["text"],
        pooled_projections=condition["pooled"],
        timestep=t,
    ).sample


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_and_gradients_agree(pair: Pair, backend: str) -> None:
    cotangent = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    pair.ours.zero_grad(), pair.peer.zero_grad()
    with kernels.use_backend(backend):
        output = pair.ours(*batch())
        (output * cotangent).sum().backward()
    expected = run_peer(pair.peer)
    assert expected.std() > 0.1
    assert relative(output, expected) < 1e-5
    (expected * cotangent).sum().backward()
    theirs = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in pair.peer.named_parameters()
    }
    # The table of positions has no gradient; a tensor of its shape stands in for the conversion.
    theirs["pos_embed.pos_embed"] = pair.ours.pos_embed
    shapes = {name: value.shape for name, value in pair.ours.state_dict().items()}
    gradients = to_ours(theirs, pair.table, shapes)
    unused = "joint_blocks.2.context_block.attn.ln_q.weight"  # queries whose answers nobody reads
    for name, value in pair.ours.named_parameters():
        if name == unused:
            assert not gradients[name].any()
            assert value.grad is None or not value.grad.any()
            continue
        assert gradients[name].any(), name
        assert relative(value.grad, gradients[name]) < 1e-4, name


@pytest.mark.parametrize(
    "name",
    [
        "x_embedder.proj.weight",
        "pos_embed",
        "t_embedder.mlp.0.bias",
        "y_embedder.mlp.2.weight",
        "context_embedder.weight",
        "joint_blocks.1.x_block.attn.qkv.weight",
        "joint_blocks.0.context_block.attn.proj.bias",
        "joint_blocks.1.context_block.mlp.fc1.weight",
        "joint_blocks.0.x_block.adaLN_modulation.1.weight",
        "joint_blocks.2.context_block.adaLN_modulation.1.bias",
        "joint_blocks.1.x_block.attn2.qkv.weight",
        "joint_blocks.0.x_block.attn.ln_q.weight",
        "joint_blocks.2.context_block.attn.ln_k.weight",
        "joint_blocks.1.x_block.attn2.ln_k.weight",
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    ],
)
def test_a_perturbed_weight_is_noticed(name: str) -> None:
    ours, peer, _ = pair_of(config_of("sd3.5-medium"), 0.1)
    with torch.no_grad():
        assert relative(ours(*batch()), run_peer(peer)) < 1e-5
        value = dict(ours.named_parameters()) | dict(ours.named_buffers())
        value[name].view(-1)[::7] += 0.1
        assert relative(ours(*batch()), run_peer(peer)) > 5e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [diffusers_table, original_table])
def test_ours_to_theirs_and_back_is_bitwise(kind: str, layout: Callable) -> None:
    config = config_of(kind)
    state = randomised(config, 0.1).state_dict()
    table = layout(config)
    theirs = to_theirs(state, table)
    back = to_ours(theirs, table, {name: value.shape for name, value in state.items()})
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert not any("null" in name for name in theirs)
    MMDiT(config, seed=1).load_state_dict(back, strict=True)


def test_only_the_published_conditioning_has_a_peer() -> None:
    attention = TEXT.model_copy(update={"semantic_path": "attention", "pooled_width": 0})
    for conditioning in (ConditioningConfig(), attention):
        config = MMDiTConfig(hidden_size=64, depth=1, conditioning=conditioning)
        with pytest.raises(UserError, match="a text with a pooled vector only"):
            diffusers_table(config)


def test_the_table_of_the_pictures_own_grid_agrees() -> None:
    config = config_of("sd3", position_table=0)
    theirs = peer_of(config).pos_embed.pos_embed
    torch.testing.assert_close(MMDiT(config).pos_embed, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_published_sizes_agree(preset: str) -> None:
    text = ConditioningConfig(semantic="text", text_tokens=154, text_width=4096, pooled_width=2048)
    config = MMDiTConfig(preset=preset, input_size=128, conditioning=text)
    with torch.device("meta"):
        ours, peer = MMDiT(config).state_dict(), peer_of(config).state_dict()
    made = to_theirs(ours, diffusers_table(config))
    assert {n: v.shape for n, v in made.items()} == {n: v.shape for n, v in peer.items()}
