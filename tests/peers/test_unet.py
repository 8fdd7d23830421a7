"""The U-Net against diffusers' UNet2DConditionModel, with the same random weights.

Two layouts: latent-diffusion's for ImageNet (one head at every width, 1 x 1 convolutions, no
attention at the first size, a class as one token) and SDXL's (heads of one width, linear maps,
deeper transformers further down, text with its one vector, and sizes, both or either). The peer
computes no class token: it is given ours, and its gradient reaches our table through it.

64 channels at least: with 32 every group would be one channel, whose normalisation takes away what
the time adds. For the smaller spread the normalisations' weights lie around 1, as they do in a
trained network; around 0 they would leave an output of 0.01.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.convert.diffusers_config import diffusers_config
from etude.convert.layout import to_ours, to_theirs
from etude.convert.unet import OURS, diffusers_table
from etude.models.conditioning import ConditioningConfig, ControlConfig
from etude.models.unet import UNet, UNetConfig
from etude.models.unet_blocks import GroupNorm, LayerNorm

UNet2DConditionModel = pytest.importorskip("diffusers").UNet2DConditionModel

SIZES = tuple(
    ControlConfig(name=name, exponent=0.0) for name in ("height", "width", "crop_top", "crop_left")
)
TEXT = dict(semantic="text", text_tokens=5, text_width=24)
SHAPE = dict(input_size=8, model_channels=64, num_res_blocks=1, num_classes=10)
LDM = UNetConfig(
    **SHAPE,
    in_channels=3,
    channel_mult=(1, 2, 3),
    attention_downsamplings=(2, 4),
    head_channels=0,
    num_heads=1,
    context_width=40,
    conditioning=ConditioningConfig(class_tokens=2),
)
SDXL = UNetConfig(
    **SHAPE,
    channel_mult=(1, 2),
    attention_downsamplings=(2,),
    transformer_depth=(1, 2),
    head_channels=16,
    linear_projection=True,
    conditioning=ConditioningConfig(
        **TEXT, pooled_width=16, control=SIZES, control_embedding="concatenated"
    ),
)
SGM = UNetConfig(
    **SHAPE,
    channel_mult=(1, 2),
    attention_downsamplings=(1, 2),
    head_channels=32,
    learn_sigma=True,
    channels_last=False,
    conditioning=ConditioningConfig(control=SIZES, control_embedding="concatenated"),
)
# A pooled text without sizes, and a middle deeper than a last level without attention.
POOLED = UNetConfig(
    **SHAPE,
    channel_mult=(1, 2),
    attention_downsamplings=(1,),
    transformer_depth=(1, 2),
    head_channels=32,
    conditioning=ConditioningConfig(**TEXT, pooled_width=16),
)
SPREADS = (0.02, 0.1)
CONFIGS = {"ldm": LDM, "sdxl": SDXL, "sgm": SGM, "pooled": POOLED}


def peer_of(config: UNetConfig) -> torch.nn.Module:
    return UNet2DConditionModel.from_config(diffusers_config(config))


def batch(config: UNetConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, config.in_channels, config.input_size, config.input_size)
    x, asked = torch.randn(shape, generator=generator), config.conditioning
    condition = {"labels": torch.tensor([0, 9, 10])}
    if asked.semantic == "text":
        shape = (3, asked.text_tokens, asked.text_width)
        condition["text"] = torch.randn(shape, generator=generator)
        condition["pooled"] = torch.randn(3, asked.pooled_width, generator=generator)
    if asked.control:
        condition["control"] = torch.tensor(
            [[512.0, 640.0, 0.0, 0.0], [256.0, 300.0, 12.0, 7.0], [64.0, 80.0, 3.0, 99.0]]
        )
    return x, torch.tensor([0, 417, 999]), condition


def call_peer(config: UNetConfig, peer: torch.nn.Module, ours: UNet) -> Tensor:
    x, t, condition = batch(config)
    more = {}
    if config.conditioning.pooled_width and not config.conditioning.control:
        more["class_labels"] = condition["pooled"]
    elif config.conditioning.pooled_width:
        sizes = {"text_embeds": condition["pooled"], "time_ids": condition["control"]}
        more["added_cond_kwargs"] = sizes
    elif config.vector_width:
        more["class_labels"] = peer.time_proj.__class__(256, True, 0)(
            condition["control"].flatten()
        ).reshape(3, -1)
    if config.conditioning.semantic == "text":
        context = condition["text"]
    else:
        context = ours.class_embedder(condition["labels"])
    return peer(x, t, context, **more).sample


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module", params=[(n, s) for n in CONFIGS for s in SPREADS], ids=str)
def models(request: pytest.FixtureRequest) -> tuple[UNetConfig, UNet, torch.nn.Module]:
    name, spread = request.param
    config = CONFIGS[name]
    ours, peer = UNet(config), peer_of(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        if spread < 0.1:
            for module in ours.modules():
                if isinstance(module, GroupNorm | LayerNorm):
                    module.weight += 1.0
    peer.load_state_dict(theirs_of(config, ours), strict=True)
    return config, ours, peer


def theirs_of(config: UNetConfig, ours: UNet) -> dict[str, Tensor]:
    state = to_theirs(ours.state_dict(), diffusers_table(config))
    return {name: value for name, value in state.items() if not name.startswith(OURS)}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_and_gradients_agree(models: tuple, backend: str) -> None:
    config, ours, peer = models
    x, t, condition = batch(config)
    expected = call_peer(config, peer, ours)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(expected.shape, generator=generator)
    ours.zero_grad()
    peer.zero_grad()
    (expected * cotangent).sum().backward()
    theirs = {name: value.grad for name, value in peer.named_parameters()}
    if "labels" in condition and config.conditioning.semantic == "class":
        theirs["class_embedder.embedding_table.weight"] = (
            ours.class_embedder.embedding_table.weight.grad.clone()
        )
    ours.zero_grad()
    with kernels.use_backend(backend):
        output = ours(x, t.float(), condition)
        (output * cotangent).sum().backward()
    assert relative(output, expected) < 1e-5
    for entry in diffusers_table(config):
        if entry.ours == "text_tokens.null":
            continue
        gradient, expected = ours.get_parameter(entry.ours).grad, theirs[entry.theirs[0]]
        if config is SGM and any(
            part in entry.ours for part in ("attn2.to_q", "attn2.to_k", "norm2")
        ):
            # Over one token a softmax is 1 whatever the scores: both gradients are rounding.
            largest = ours.get_parameter("time_embed.2.weight").grad.norm()
            assert max(gradient.norm(), expected.norm()) < 1e-4 * largest
        else:
            assert relative(gradient, expected) < 1e-4, entry.ours


def test_the_output_is_not_near_zero(models: tuple) -> None:
    config, ours, peer = models
    assert call_peer(config, peer, ours).std() > 0.1


@pytest.mark.parametrize("models", [("ldm", 0.1), ("sdxl", 0.1)], indirect=True, ids=str)
def test_every_weight_is_noticed(models: tuple) -> None:
    """One tensor of each kind, moved in ours alone."""
    config, ours, peer = models
    x, t, condition = batch(config)
    with torch.no_grad():
        expected = call_peer(config, peer, ours)
        kinds = {}
        for name, parameter in ours.named_parameters():
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            if not name.startswith("class_embedder"):  # the peer is given its tokens
                kinds.setdefault(kind, parameter)
        for kind, parameter in kinds.items():
            kept = parameter.clone()
            parameter.view(-1)[::7] += 1.0
            assert relative(ours(x, t.float(), condition), expected) > 5e-5, kind
            parameter.copy_(kept)
    assert len(kinds) > 30


def test_conversion_there_and_back_is_exact(models: tuple) -> None:
    config, ours, _ = models
    state, table = ours.state_dict(), diffusers_table(config)
    shapes = {name: value.shape for name, value in state.items()}
    back = to_ours(to_theirs(state, table), table, shapes)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
