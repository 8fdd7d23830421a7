"""ViT: published sizes, the textbook forward pass, first weights, and what is refused."""

import math

import pytest
import torch
from pydantic import ValidationError

from etude.models.vit import ViT, ViTConfig

SMALL = ViTConfig(
    input_size=12, patch_size=4, in_channels=2, num_classes=5, hidden_size=24, depth=2, num_heads=3
)


@pytest.mark.parametrize(("preset", "count"), [("s", 22_050_664), ("b", 86_567_656)])
def test_parameter_counts_are_the_published_ones(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = ViT(ViTConfig(preset=preset))
    assert sum(p.numel() for p in model.parameters()) == count


def textbook(model: ViT, x: torch.Tensor) -> torch.Tensor:
    """The forward pass written out, in the precision of x."""
    config, w = model.config, model.state_dict()
    size, heads = config.patch_size, config.num_heads
    patches = x.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3)
    kernel = w["patch_embed.proj.weight"].flatten(1)
    tokens = patches.flatten(1, 2) @ kernel.T + w["patch_embed.proj.bias"]
    h = torch.cat([w["cls_token"].expand(len(x), -1, -1), tokens], 1) + w["pos_embed"]

    def normed(h, name):
        centred = h - h.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for n in range(config.depth):
        qkv = linear(normed(h, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv")
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        shares = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        h = h + linear((shares @ v).transpose(1, 2).flatten(2), f"blocks.{n}.attn.proj")
        z = linear(normed(h, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1")
        h = h + linear(z * (1 + torch.erf(z / math.sqrt(2))) / 2, f"blocks.{n}.mlp.fc2")
    return linear(normed(h, "norm")[:, 0], "head")


def test_logits_and_the_pictures_gradient_are_the_textbooks() -> None:
    model, generator = ViT(SMALL).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
    x = torch.randn(3, 2, 12, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    found, expected = model(x), textbook(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.head(model.features(x)), found)


def test_first_weights_are_drawn_as_stated_and_follow_the_seed() -> None:
    model = ViT(ViTConfig(preset="s", num_classes=100), seed=3)
    weights = model.state_dict()
    for name, spread in {
        "blocks.3.mlp.fc1.weight": 0.02,
        "blocks.0.attn.qkv.weight": 0.02,
        "patch_embed.proj.weight": 1 / math.sqrt(3 * 16 * 16),
    }.items():
        # a normal cut off at two spreads keeps 0.880 of its spread
        assert float(weights[name].std()) == pytest.approx(0.880 * spread, rel=0.01), name
        assert float(weights[name].abs().max()) <= 2 * spread
    assert float(weights["pos_embed"].std()) == pytest.approx(0.02, rel=0.02)
    for name in ("cls_token", "head.bias", "blocks.1.attn.qkv.bias", "patch_embed.proj.bias"):
        assert not weights[name].any(), name
    one, two, other = (ViT(SMALL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_contradictions_and_wrong_sizes_are_refused() -> None:
    assert ViTConfig(preset="b").hidden_size == 768
    for fields, message in (
        ({"preset": "b", "depth": 3}, "contradicts preset b"),
        ({"input_size": 30}, "not a multiple of patch_size=16"),
        ({"hidden_size": 100, "num_heads": 3}, "not a multiple of num_heads=3"),
        ({"preset": "l"}, "'', 's' or 'b'"),
    ):
        with pytest.raises(ValidationError, match=message):
            ViTConfig(**fields)
    with pytest.raises(ValueError, match="sees pictures of 12 x 12 pixels, not 16 x 12"):
        ViT(SMALL)(torch.zeros(1, 2, 12, 16))
