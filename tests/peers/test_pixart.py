"""PixArt against diffusers' PixArtTransformer2DModel, with the same random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from etude import kernels
from etude.convert.diffusers_config import diffusers_config
from etude.convert.layout import to_ours, to_theirs
from etude.convert.pixart import diffusers_table
from etude.models.pixart import PixArt, PixArtConfig

PixArtTransformer2DModel = pytest.importorskip("diffusers").PixArtTransformer2DModel

TEXT = {"semantic": "text", "text_tokens": 7, "text_width": 24}
MICRO = [{"name": name, "exponent": 0.0} for name in ("height", "width", "aspect")]
LENGTHS = torch.tensor([5, 1, 7])


def config(micro: bool) -> PixArtConfig:
    return PixArtConfig(
        input_size=8,
        hidden_size=96,
        depth=3,
        num_heads=4,
        interpolation_scale=2.0 if micro else 1.0,
        micro_conditions=micro,
        conditioning=TEXT | {"control": MICRO if micro else []},
    )


@pytest.fixture(scope="module", params=[(0.02, False), (0.1, False), (0.02, True), (0.1, True)])
def models(request: pytest.FixtureRequest) -> tuple[PixArt, nn.Module]:
    spread, micro = request.param
    ours = PixArt(config(micro))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in ours.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * spread)
    peer = PixArtTransformer2DModel.from_config(diffusers_config(ours.config))
    peer.load_state_dict(to_theirs(ours.state_dict(), diffusers_table(ours.config)), strict=True)
    return ours, peer


def batch(micro: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 7, 24, generator=generator)
    condition = {"text": text, "text_lengths": LENGTHS}
    if micro:
        condition["control"] = torch.tensor([[256.0, 512.0, 0.5], [64, 64, 1], [128, 96, 1.333]])
    return x, torch.tensor([0, 417, 999]), condition


def expected(peer: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
    added, lengths = None, condition.get("text_lengths")
    if "control" in condition:
        control = condition["control"]
        added = {"resolution": control[:, :2], "aspect_ratio": control[:, 2:]}
    mask = None if lengths is None else (torch.arange(7) < lengths[:, None]).float()
    return peer(
        x,
        encoder_hidden_states=condition["text"],
        timestep=t,
        added_cond_kwargs=added,
        encoder_attention_mask=mask,
    ).sample


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_and_gradients_agree(models: tuple, backend: str, masked: bool) -> None:
    ours, peer = models
    x, t, condition = batch(ours.config.micro_conditions)
    if not masked:
        del condition["text_lengths"]
    cotangent = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    with kernels.use_backend(backend):
        output = ours(x, t.float(), condition)
        ours.zero_grad()
        (output * cotangent).sum().backward()
    wanted = expected(peer, x, t, condition)
    assert wanted.std() > 0.1
    assert relative(output, wanted) < 1e-5
    peer.zero_grad()
    (wanted * cotangent).sum().backward()
    # Gradients go through the layout as weights do; what only we have is no parameter.
    buffers = {name for name, _ in ours.named_buffers()}
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    found = {name: value.grad for name, value in peer.named_parameters()}
    gradients = to_ours(found, diffusers_table(ours.config), shapes)
    assert gradients.keys() - buffers == {name for name, _ in ours.named_parameters()}
    for name, value in ours.named_parameters():
        if name.endswith("qkv.bias") or name.endswith("kv_linear.bias"):
            # A key's bias adds the same to all scores of a query: its gradient is rounding.
            parts = 3 if "qkv" in name else 2
            kept = [k for k in range(parts) if k != parts - 2]
            pair = [
                torch.cat([g.chunk(parts)[k] for k in kept]) for g in (value.grad, gradients[name])
            ]
            assert relative(*pair) < 1e-4, name
        else:
            assert relative(value.grad, gradients[name]) < 1e-4, name


def test_a_perturbed_weight_of_each_kind_is_noticed(models: tuple) -> None:
    ours, peer = models
    x, t, condition = batch(ours.config.micro_conditions)
    generator = torch.Generator().manual_seed(3)
    faint = ours.t_block[1].weight.std() < 0.05  # then all keys of a text score alike
    with torch.no_grad():
        wanted = expected(peer, x, t, condition)
        for name, value in ours.named_parameters():
            if name.startswith(("blocks.0.", "blocks.1.")):
                continue  # the last block stands for all
            if faint and ".cross_attn.q_linear." in name:
                continue
            kept = value.clone()
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
            worse = relative(ours(x, t.float(), condition), wanted)
            value.copy_(kept)
            assert worse > 3e-5, name


def test_position_table_agrees(models: tuple) -> None:
    ours, peer = models
    table = peer.pos_embed.pos_embed
    torch.testing.assert_close(ours.pos_embed, table.to(torch.float32), rtol=0, atol=1e-6)


def test_reading_theirs_gives_our_weights(models: tuple) -> None:
    ours, peer = models
    state = ours.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    table = diffusers_table(ours.config, null=state["y_embedder.y_embedding"])
    read = to_ours(peer.state_dict(), table, shapes)
    assert all(torch.equal(read[name], value) for name, value in state.items())
    PixArt(ours.config, seed=1).load_state_dict(read, strict=True)
