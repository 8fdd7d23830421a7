"""Operators on tensors of another GPU than the current one; run by `make gpu` where two are."""

import pytest
import torch

from etude import kernels

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_another_device_than_the_current_one() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 8, 8, generator=g)
    rows, image = torch.randn(70, 16, generator=g), torch.zeros(2, 9, 9, 3, dtype=torch.uint8)
    tokens, vectors = torch.randn(4, 6, 64, generator=g), torch.randn(2, 4, 64, generator=g)
    place, scale = torch.arange(4), torch.rand(4, generator=g)

    def everything(device: str) -> list[torch.Tensor]:
        a, b, p, s, r = (t.to(device) for t in (x, x + 1, place, scale, rows))
        key = {"seed": 1, "stream": 2}
        return [
            kernels.diffuse(a, p, s, s, **key),
            kernels.diffusion_loss(b, a, p, s, s, **key, target="flow"),
            *kernels.solver_step(a, b, torch.ones(8, device=device)),
            kernels.to_uint8(a).float(),
            kernels.resize(image.to(device), (5, 5)).float(),
            kernels.moments(r)[0],
            kernels.nearest_neighbours(r, k=2)[0],
            kernels.adaln_modulate(tokens.to(device), *vectors.to(device)),
        ]

    assert torch.cuda.current_device() == 0
    for got, want in zip(everything("cuda:1"), everything("cpu"), strict=True):
        torch.testing.assert_close(got.cpu().double(), want.double(), rtol=1e-4, atol=1e-4)
    assert torch.cuda.current_device() == 0
