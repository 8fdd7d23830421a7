"""Losses under a shifted law of times, images until a loss, and which run is which arm."""

import numpy as np
import pytest
import torch

from benchmarks.transfer_digits import GOALS, HeldOut, arm_of, images_to_reach, mean_loss
from etude.core.recipe import load_recipe
from etude.diffusion.schedules import Schedule


def test_a_loss_is_reached_where_the_line_between_two_points_crosses_it() -> None:
    images, losses = [0, 100, 200, 400], [2.0, 1.0, 1.5, 0.5]
    assert images_to_reach(images, losses, 1.75) == pytest.approx(25)
    assert images_to_reach(images, losses, 1.0) == 100
    assert images_to_reach(images, losses, 0.75) == pytest.approx(350)
    assert images_to_reach(images, losses, 3.0) == 0
    assert images_to_reach(images, losses, 0.4) is None


@pytest.mark.parametrize("shift", [1.0, 2.0, 0.5])
def test_evenly_spread_times_weigh_as_those_that_the_schedule_shifts(shift: float) -> None:
    even = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    shifted = Schedule("flow", shift=shift).snap(even)
    for loss in (lambda t: t, lambda t: (1 - t) ** 2 + 0.3):
        expected = float(loss(shifted).mean())
        assert mean_loss(loss(even).numpy(), even.numpy(), shift) == pytest.approx(expected, 1e-6)


def test_losses_are_those_of_each_row_whatever_the_block() -> None:
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 7, 3, 4, 4, generator=generator)
    t, labels = torch.rand(7, generator=generator), torch.arange(7)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
            return x * (t / 1000.0 + condition["labels"])[:, None, None, None]

    expected = [
        float((x[k] * (t[k] + k) - target[k]).double().square().mean()) for k in range(len(t))
    ]
    found = HeldOut(x, t, target, {"labels": labels})
    for block in (3, 7):
        assert found.losses(Model(), block) == pytest.approx(np.array(expected), rel=1e-5)


def test_runs_are_told_apart_by_start_and_shift() -> None:
    assert arm_of(load_recipe("ldm/digits")) == GOALS[1]
    more = ["start.from=runs/a", "start.positions=extrapolate"]
    assert arm_of(load_recipe("ldm/digits", more)) == GOALS[0]
