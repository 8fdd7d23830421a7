"""Two models in one step: textbook updates, one guard for both, one checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from etude.core.checkpoint import load_checkpoint, save_checkpoint
from etude.core.distributed import World
from etude.core.optim import OptimConfig
from etude.core.strategy import StrategyConfig
from etude.core.strategy_local import LocalStrategy
from etude.core.strategy_pair import PairStrategy

ALONE = World(0, 1, 0, torch.device("cpu"), ("here:cpu",))
LOCAL = StrategyConfig(kind="local")
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Pair:
    """A regressor and a second one that predicts the first's output; plays from step 1 on."""

    def __init__(self, accumulation: int = 2) -> None:
        self.models = self.fresh()
        optims = OptimConfig(lr=1e-2, ema=[0.9]), OptimConfig(lr=4e-2, betas=(0.5, 0.9), ema=[])
        first, second = (
            LocalStrategy(LOCAL, model, optim, ALONE, accumulation)
            for model, optim in zip(self.models, optims, strict=True)
        )
        self.strategy = PairStrategy(first, second, "judge", self.second_loss, lr_ratio=4.0)
        self.seen: Tensor | None = None
        self.spoil = {"first": 1.0, "second": 1.0, "gradient": 1.0}

    @staticmethod
    def fresh() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(1)
        return nn.Linear(3, 3), nn.Linear(3, 3)

    def second_loss(self) -> Tensor | None:
        if self.seen is None:
            return None
        seen, self.seen = self.seen, None
        out = self.strategy.second(seen)
        out.register_hook(lambda g: g * self.spoil["gradient"])
        return (out - seen).square().mean() * self.spoil["second"]

    def step(self, number: int, accumulation: int = 2) -> None:
        for part in X.chunk(accumulation):
            out = self.strategy(part)
            if number >= 1:
                self.seen = out.detach()
            self.strategy.backward((out - part.sin()).square().mean() * self.spoil["first"])
        self.strategy.step(1e-2)

    def state(self) -> dict[tuple[str, str], Tensor]:
        return {(f.name, f.state): f.data.clone() for f in self.strategy.fragments()}


def test_both_take_textbook_steps() -> None:
    pair, (first, second) = Pair(), Pair.fresh()
    one = torch.optim.AdamW(first.parameters(), lr=1e-2, weight_decay=0.0)
    two = torch.optim.AdamW(second.parameters(), lr=4e-2, betas=(0.5, 0.9), weight_decay=0.0)
    for number in range(4):
        pair.step(number)
        out = first(X)
        (out - X.sin()).square().mean().backward()
        one.step()
        one.zero_grad()
        if number >= 1:
            seen = out.detach()
            (second(seen) - seen).square().mean().backward()
            two.step()
            two.zero_grad()
    for ours, theirs in zip(pair.models, (first, second), strict=True):
        for name, wanted in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), wanted, rtol=1e-5, atol=1e-6)
    state = pair.state()
    assert float(state["weight", "step"]) == 4 and float(state["judge.weight", "step"]) == 3


@pytest.mark.parametrize("fault", ["first", "second", "gradient"])
def test_a_fault_of_either_changes_neither(fault: str) -> None:
    pair = Pair()
    pair.step(0)
    pair.step(1)
    before = pair.state()
    pair.spoil[fault] = float("nan")
    pair.step(2)
    assert bool(pair.strategy.nonfinite)
    after = pair.state()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    pair.spoil[fault] = 1.0
    pair.step(3)
    assert not bool(pair.strategy.nonfinite)
    after = pair.state()
    assert all(not torch.equal(before[n, "step"], after[n, "step"]) for n in ("bias", "judge.bias"))


def test_a_checkpoint_holds_both(tmp_path: Path) -> None:
    pair, again = Pair(), Pair()
    for number in range(3):
        pair.step(number)
    path = save_checkpoint(tmp_path, 3, pair.strategy, {}, ALONE)
    load_checkpoint(path, again.strategy)
    assert pair.state().keys() == again.strategy.inventory().keys()
    for number in (3, 4):
        pair.step(number)
        again.step(number)
    assert all(torch.equal(value, again.state()[key]) for key, value in pair.state().items())
