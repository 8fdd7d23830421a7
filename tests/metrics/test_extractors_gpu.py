"""Networks and figures on a CUDA device against the same on the CPU."""

import numpy as np
import pytest
import torch
from torch import nn

from etude.metrics.extractors import Backbone, Extractor, extractor
from etude.metrics.figures import measure
from etude.metrics.frechet import FrechetReference
from etude.metrics.intervals import IntervalConfig
from etude.metrics.moments import Moments
from etude.metrics.registry import Pair

pytestmark = pytest.mark.gpu


@extractor("of a gpu test")
class Small(Backbone):
    """Convolutions and products with the same random weights wherever it is opened."""

    version, input_size, resize, needs_weights = "1", 32, "none", False
    taps = {"features": 64}

    def __init__(self, weights: None) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.GELU(), nn.Conv2d(32, 48, 3, stride=2), nn.GELU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 64),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for value in self.network.parameters():
            scale = (2.0 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
            value.data = torch.randn(value.shape, generator=generator) * scale

    def prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (images.permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0).contiguous()

    def forward(self, x: torch.Tensor, taps) -> dict[str, torch.Tensor]:
        return {"features": self.network(x)}


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(noise)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("float32", 1e-5), ("tf32", 5e-3), ("bfloat16", 5e-2), ("float16", 1e-2)],
)
def test_features_are_the_cpus_within_the_precision(dtype: str, bound: float, compiled) -> None:
    exact = Extractor("of a gpu test")
    there = Extractor("of a gpu test", dtype=dtype, device="cuda", compile=compiled)
    kept = [
        there(pictures(8, seed)) for seed in range(4)
    ]  # replays must not overwrite earlier ones
    for seed, found in enumerate(kept):
        expected = exact(pictures(8, seed))
        error = (found.cpu() - expected).abs().max() / expected.abs().max()
        assert found.dtype == torch.float32 and error < bound


def cloud(count: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    scale = (1.0 + np.arange(dim)) ** -0.5
    return torch.from_numpy(rng.normal(shift, 1.0, (count, dim)) * scale + 0.5).float()


@pytest.mark.parametrize("rows", [1500, 200])
def test_frechet_is_the_cpus(rows: int) -> None:
    real, drawn = cloud(rows, 256, 0), cloud(rows, 256, 1, 0.1)
    expected = FrechetReference(real).distance(drawn, warn=False)
    found = FrechetReference(real.cuda()).distance(drawn.cuda(), warn=False)
    assert found == pytest.approx(expected, rel=1e-8)
    parts = [Moments.of(side.cuda()) for side in (real, drawn)]
    assert FrechetReference(parts[0]).distance(parts[1]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    "name", ["frechet", "kid", "cmmd", "prdc", "authenticity", "vendi", "mind"]
)
def test_figures_and_their_errors_are_the_cpus(name: str) -> None:
    config = IntervalConfig(replicates=20)
    real, drawn = cloud(300, 24, 2), cloud(260, 24, 3, 0.1)
    expected = measure(Pair(real, drawn, "test"), name, config)
    found = measure(Pair(real.cuda(), drawn.cuda(), "test"), name, config)
    for figure, one in expected.items():
        assert found[figure].value == pytest.approx(one.value, rel=1e-7, abs=1e-9)
        np.testing.assert_allclose(found[figure].drawn, one.drawn, rtol=1e-6, atol=1e-8)
