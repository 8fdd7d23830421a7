"""The patch discriminator: published count and field of view, independence of a batch, losses."""

import math

import pytest
import torch
from torch import nn

from etude.models.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)

SMALL = DiscriminatorConfig(channels=8, layers=2, groups=4)


def pictures(count: int, side: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_published_size() -> None:
    """2.769 million parameters of pix2pix, whose discriminator sees two pictures at a time."""
    for norm in ("batch", "group"):
        model = PatchDiscriminator(DiscriminatorConfig(norm=norm), in_channels=6)
        assert sum(p.numel() for p in model.parameters()) == 2_768_705
    model = PatchDiscriminator(DiscriminatorConfig())
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [float(w.detach().std()) for w in weights] == pytest.approx([0.02] * 5, rel=0.06)
    norms = torch.cat([m.weight.detach() for m in model.modules() if isinstance(m, nn.GroupNorm)])
    assert float(norms.mean()) == pytest.approx(1.0, abs=0.003)
    assert float(norms.std()) == pytest.approx(0.02, rel=0.1)


def test_a_logit_sees_seventy_pixels() -> None:
    model = PatchDiscriminator(DiscriminatorConfig(channels=4, groups=4))
    model.layers = nn.Sequential(
        *[m for m in model.layers if not isinstance(m, nn.GroupNorm | nn.LeakyReLU)]
    )
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    model(x)[0, 0, 7, 7].backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == 70


def test_rows_are_independent_with_groups_and_not_with_a_batch() -> None:
    x = pictures(4)
    model = PatchDiscriminator(SMALL, seed=1)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-6)
    batch = PatchDiscriminator(SMALL.model_copy(update={"norm": "batch"}), seed=1)
    alone = torch.cat([batch(row[None]) for row in x])
    assert (batch(x) - alone).abs().max() > 1e-3
    assert dict(batch.named_buffers()) == {}
    assert torch.equal(model(x), PatchDiscriminator(SMALL, seed=1)(x))
    assert not torch.equal(model(x), PatchDiscriminator(SMALL, seed=2)(x))
    assert model.bfloat16()(x).dtype == torch.bfloat16


def test_losses_by_hand() -> None:
    real = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]).view(2, 1, 1, 2)
    fake = torch.tensor([[-2.0, 0.25], [-0.5, -1.0]]).view(2, 1, 1, 2)
    hinge = discriminator_loss(real, fake)
    assert hinge.tolist() == [0.5 * (0.25 + 0.625), 0.5 * (1.0 + 0.25)]
    assert generator_loss(fake).tolist() == [0.875, 0.75]

    def softplus(*values: float) -> float:
        return sum(math.log1p(math.exp(v)) for v in values) / len(values)

    wanted = [
        0.5 * (softplus(-2.0, -0.5) + softplus(-2.0, 0.25)),
        0.5 * (softplus(1.0, -1.0) + softplus(-0.5, -1.0)),
    ]
    assert discriminator_loss(real, fake, "nonsaturating").tolist() == pytest.approx(wanted)
    wanted = [softplus(2.0, -0.25), softplus(0.5, 1.0)]
    assert generator_loss(fake, "nonsaturating").tolist() == pytest.approx(wanted)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="groups=5 does not divide"):
        DiscriminatorConfig(channels=8, groups=5)
    assert SMALL.smallest == 12
    assert PatchDiscriminator(SMALL)(pictures(1, 12)).shape == (1, 1, 1, 1)
