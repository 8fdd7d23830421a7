"""Preprocessing: its resize and arithmetic, and how often the host hands something over."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from etude.core.distributed import World
from etude.practice.augmenting import Prepared
from etude.practice.learner import Learner, LearnerConfig

HERE = World(0, 1, 0, torch.device("cpu"))
SMALL = {"in_channels": 3, "num_classes": 4, "channels": (8,), "groups": 4}
EVERYTHING = {
    "flip": True,
    "erase": 0.5,
    "mixup": 0.5,
    "cutmix": 1.0,
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.2, 0.3),
    "input_size": 12,
}


def prepared(**fields) -> Prepared:
    return Prepared(torch.nn.Identity(), LearnerConfig(model=SMALL, **fields))


def pictures(height: int, width: int) -> torch.Tensor:
    drawn = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return drawn * 2.0 - 1.0


@pytest.mark.parametrize("size", [(37, 29), (16, 50), (512, 300), (9, 11), (5, 224)])
def test_pictures_are_resized_as_interpolate_does(size: tuple[int, int]) -> None:
    """Values and gradients, smaller and larger; F.interpolate in float64."""
    for side in (16, 224):
        x = pictures(*size).requires_grad_()
        wide = x.detach().double().requires_grad_()
        expected = F.interpolate(wide, (side, side), mode="bilinear", antialias=True)
        found = prepared(input_size=side).prepare(x)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        (exact,) = torch.autograd.grad(expected.square().sum(), wide)
        scale = exact.abs().max()
        torch.testing.assert_close(gradient / scale, (exact / scale).float(), rtol=0, atol=2e-6)


def test_preprocessing_is_float32_under_autocast_and_for_bf16_pictures() -> None:
    network, x = prepared(input_size=16, mean=(0.45,), std=(0.3,)), pictures(40, 30)
    expected = network.prepare(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.prepare(x), expected)
        rounded = network.prepare(x.bfloat16())
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, network.prepare(x.bfloat16().float()))
    assert torch.equal(network.bfloat16().prepare(x), expected)


def test_no_gradient_passes_through_sums_in_no_fixed_order() -> None:
    """The backward pass of torch's own resize adds atomically on a GPU: it is nowhere in ours."""
    x, nodes = pictures(40, 30).requires_grad_(), []
    found = prepared(input_size=16, mean=(0.4,), std=(0.2,)).prepare(x)
    waiting = [found.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            nodes.append(node.name())
            waiting += [after for after, _ in node.next_functions]
    assert any("AccumulateGrad" in name for name in nodes)
    assert not [name for name in nodes if "Upsample" in name or "Index" in name]


@pytest.mark.parametrize("move", [{"shift": 1}, {"shift": 0, "crop_scale": (0.3, 1.0)}])
def test_the_host_hands_over_a_few_arrays_a_step_whatever_its_size(move, monkeypatch) -> None:
    """Each tensor that is made of the host's numbers is a copy that a GPU would wait for."""
    handed = []
    for name in ("from_numpy", "tensor", "as_tensor"):
        made = getattr(torch, name)
        count = lambda *a, made=made, **k: (handed.append(1), made(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(torch, name, count)
    images = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), np.uint8)
    counts = set()
    for batch in (4, 200):
        for num_ops in (1, 6):
            fields = EVERYTHING | move | {"batch": batch, "randaugment": {"num_ops": num_ops}}
            learner = Learner(LearnerConfig(model=SMALL, **fields), 3, HERE)
            for step in range(2):
                handed.clear()
                learner.step(lambda at: (images[: len(at)], at % 4), step, 1.0)
                counts.add(len(handed))
    assert len(counts) == 1 and counts.pop() <= 8
