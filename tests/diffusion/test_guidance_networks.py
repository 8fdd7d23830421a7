"""Entropy guidance through networks in the precisions they are used in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude.diffusion.guidance import EntropyGuidance, GuidanceConfig
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.diffusion.samplers import SamplerConfig, sample
from etude.models.classifier import Classifier, ClassifierConfig
from etude.models.dit import DiT, DiTConfig

FLOW = Objective(ObjectiveConfig())


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def real_networks(seed: int) -> tuple[nn.Module, nn.Module]:
    """A DiT over (B, 2, 4, 4) with all its weights away from zero, and a classifier; 3 classes."""
    shape = dict(input_size=4, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    model = DiT(DiTConfig(**shape, learn_sigma=True))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    learner = Classifier(ClassifierConfig(in_channels=2, channels=(8, 16), groups=4, num_classes=3))
    return model, learner


def test_gradient_through_the_real_networks() -> None:
    """Float32 and the operators in use, against float64 and the references."""
    model, learner = real_networks(seed=5)
    t, labels, x = torch.tensor([0.8, 0.5, 0.2]), torch.tensor([0, 2, 3]), draw(3, 2, 4, 4)

    def found(dtype: torch.dtype) -> torch.Tensor:
        model.to(dtype), learner.to(dtype)
        guide = EntropyGuidance(
            GuidanceConfig(), learner, lambda x0: F.interpolate(x0, scale_factor=2.0)
        )
        leaf, time, condition = x.to(dtype).requires_grad_(), t.to(dtype), {"labels": labels}
        return guide.gradient(FLOW, leaf, model(leaf, time * 1000, condition), time, condition)

    single, double = found(torch.float32), found(torch.float64)
    error = (single - double).flatten(1).norm(dim=1) / double.flatten(1).norm(dim=1)
    assert (error < 1e-3).all()
    assert all(p.grad is None for p in (*model.parameters(), *learner.parameters()))


@pytest.mark.parametrize("mode", ["score", "norm_matched"])
@pytest.mark.parametrize("path", ["full", "stop_denoiser"])
def test_a_vanishing_omega_is_plain_sampling_through_a_real_network(mode: str, path: str) -> None:
    """In float32, with classifier-free guidance at the published frequency. Only `full` evaluates
    the conditional rows on their own, which rounds matrix products otherwise."""
    model, learner = real_networks(seed=6)
    z, labels = draw(5, 2, 4, 4).float(), torch.arange(5) % 3
    null = {"labels": torch.full((5,), 3)}

    def run(omega: float | None) -> torch.Tensor:
        config = GuidanceConfig(omega=omega, mode=mode, path=path) if omega is not None else None
        guide = EntropyGuidance(config, learner, lambda x: x) if config else None
        options = SamplerConfig(steps=30, guidance_scale=1.5, guidance_convention="lambda")
        return sample(
            lambda x, t, condition: model(x, t * 1000, condition),
            FLOW, options, z, {"labels": labels}, nulls=[null], guide=guide,
        )  # fmt: skip

    plain = run(None)
    assert torch.equal(run(0.0), plain)
    apart = (run(1e-12) - plain).abs().max() / plain.abs().max()
    assert apart <= (1e-6 if path == "full" else 0.0)
    assert (run(10.0) - plain).abs().max() > 1e-3


def test_a_small_gradient_survives_a_network_in_half_precision() -> None:
    """A gradient of 1e-9 lies below what float16 holds; its direction must not be lost."""
    weight, x, t = draw(6, 6, seed=1), draw(2, 6, 1, 1), torch.tensor([0.4, 0.8])
    labels = {"labels": torch.tensor([0, 1])}

    def learner(x: torch.Tensor) -> torch.Tensor:
        return 1.0 + 1e-9 * x.flatten(1)[:, :2]

    def found(dtype: torch.dtype) -> torch.Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaf = x.to(wide).requires_grad_()
        output = (leaf.flatten(1).to(dtype) @ weight.to(dtype)).view_as(leaf)
        guide = EntropyGuidance(GuidanceConfig(criterion="loss"), learner, lambda x: x)
        return guide.gradient(FLOW, leaf, output.to(wide), t.to(wide), labels)

    double = found(torch.float64)
    assert 1e-10 < double.abs().max() < 1e-8
    torch.testing.assert_close(
        found(torch.float16).double() / 1e-9, double / 1e-9, rtol=0.01, atol=0.01
    )
