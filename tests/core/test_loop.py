"""The loop alone: when it logs, evaluates and saves, what it averages, and when the host waits."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from etude.core import optim
from etude.core.checkpoint import latest_checkpoint, load_checkpoint
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.log import Log, read_metrics
from etude.core.loop import LoopConfig, run_loop
from etude.core.optim import OptimConfig
from etude.core.signals import Stopper
from etude.core.strategy import StrategyConfig, build_strategy

ALONE = World(0, 1, 0, torch.device("cpu"), ("here:cpu",))
OPTIM = OptimConfig(lr=1e-2, ema=[0.9], clip=1.0)


@dataclass
class Micro:
    """A micro batch as the loop needs it: keys, waiting time, and our own numbers."""

    x: torch.Tensor
    keys: list[str]
    wait_seconds: float = 0.0


def config(**changes) -> LoopConfig:
    base = {"images": 160, "global_batch": 16, "micro_batch": 8, "log_every": 16}
    base |= {"evaluate_every": 160, "checkpoint": {"every_images": 160}}
    return LoopConfig.model_validate(base | changes)


def stream(start: int, micro: int = 8):
    position = start
    while True:
        places = torch.arange(position, position + micro, dtype=torch.float32)
        x = torch.stack([torch.sin(places), torch.cos(1.7 * places)], dim=1)
        yield Micro(x, [f"s{p}" for p in range(position, position + micro)])
        position += micro


def losses(forward, batch: Micro) -> torch.Tensor:
    return (forward(batch.x)[:, 0] - batch.x.prod(1)).square()


def new_strategy(accumulation: int = 2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    return build_strategy(StrategyConfig(kind="local"), net, OPTIM, ALONE, accumulation, 8)


def go(folder: Path, loop: LoopConfig, strategy=None, batches=stream, stopper=None, **more):
    log = Log(folder, quiet=True)
    outcome = run_loop(
        config=loop,
        optim=OPTIM,
        strategy=strategy or new_strategy(),
        batches=batches,
        losses=losses,
        world=ALONE,
        log=log,
        checkpoints=folder / "checkpoints",
        stopper=stopper or Stopper(),
        **more,
    )
    log.close()
    return outcome


def test_intervals_are_met_at_the_first_step_that_reaches_them(tmp_path: Path) -> None:
    """Global batch 16 divides none of the intervals, nor the length."""
    looks: list[int] = []
    loop = config(
        images=150,
        log_every=24,
        evaluate_every=50,
        checkpoint={"every_images": 70, "keep_last": 9},
    )
    outcome = go(tmp_path, loop, evaluate=looks.append)
    assert (outcome.images_seen, outcome.stopped) == (160, None)
    rows = read_metrics(tmp_path / "metrics.jsonl", "train")
    assert [row["images_seen"] for row in rows] == [32, 48, 80, 96, 128, 144, 160]
    assert looks == [64, 112, 160]
    saved = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert [int(name.removeprefix("step-")) for name in saved] == [80, 144, 160]


def test_the_logged_loss_is_the_mean_over_the_interval(tmp_path: Path) -> None:
    """Against the per-sample losses that went into backward, averaged in float64."""
    seen: list[np.ndarray] = []

    def spied(forward, batch):
        values = losses(forward, batch)
        seen.append(values.detach().double().numpy())
        return values

    log = Log(tmp_path, quiet=True)
    run_loop(
        config=config(images=96, log_every=48),
        optim=OPTIM,
        strategy=new_strategy(),
        batches=stream,
        losses=spied,
        world=ALONE,
        log=log,
        checkpoints=tmp_path / "c",
        stopper=Stopper(),
    )
    rows = read_metrics(tmp_path / "metrics.jsonl", "train")
    expected = [np.concatenate(seen[i : i + 6]).mean() for i in (0, 6)]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-12)


def test_a_stop_between_two_log_lines_changes_no_line(tmp_path: Path) -> None:
    """Stopped inside an interval and resumed: the line after it averages the whole interval."""
    loop = config(log_every=80)
    go(tmp_path / "straight", loop)
    stopper, folder = Stopper(), tmp_path / "parted"

    def counted(start: int):
        for number, batch in enumerate(stream(start)):
            if number == 5:  # inside the third step
                stopper.request("a test")
            yield batch

    outcome = go(folder, loop, batches=counted, stopper=stopper)
    assert (outcome.images_seen, outcome.stopped) == (48, "a test")
    strategy = new_strategy()
    extra = load_checkpoint(latest_checkpoint(folder / "checkpoints"), strategy)
    assert extra["images_seen"] == 48
    go(folder, loop, strategy, start=48, resumed=extra["loop"])
    rows = [read_metrics(tmp_path / n / "metrics.jsonl", "train") for n in ("straight", "parted")]
    assert [(r["images_seen"], r["loss"], r["grad_norm"]) for r in rows[0]] == [
        (r["images_seen"], r["loss"], r["grad_norm"]) for r in rows[1]
    ]


class Reads(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_host_reads_two_flags_a_step_and_numbers_at_log_lines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the optimizer's op, which reads its scalars where they lie when that is the host."""
    reads, at_start_of_step, op = Reads(), [], optim.adamw_ema

    def not_counted(*args, **kwargs) -> None:
        before = reads.count
        op(*args, **kwargs)
        reads.count = before

    monkeypatch.setattr(optim, "adamw_ema", not_counted)

    def watched(start: int):
        for number, batch in enumerate(stream(start)):
            if number % 2 == 0:
                at_start_of_step.append(reads.count)
            yield batch

    with reads:
        go(tmp_path, config(log_every=80), batches=watched)
    per_step = np.diff(at_start_of_step)  # from the start of one step to that of the next
    # the first step counts each parameter's updates once (4 parameters); every step reads the
    # verdict of the one before; the step that logs also reads the gradient norm
    assert per_step[0] == 2 + 4
    assert per_step[1:].tolist() == [2, 2, 2, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_the_step_that_is_not_finite_is_told_before_a_checkpoint_passes_it(
    tmp_path: Path, where: str, mode: str
) -> None:
    """The bad step is the one that a checkpoint is due after, so the verdict is read early."""

    def faulty(start: int):
        for number, batch in enumerate(stream(start)):
            if start + 8 * number == 64:  # first micro batch of step 4
                if where == "loss":
                    batch.x[3] = torch.nan
                else:  # the root of 0 has an infinite slope
                    batch.x[3] = 0.0
            yield batch

    def rooted(forward, batch):
        values = losses(forward, batch)
        if where == "gradient":
            values = values + (forward(batch.x)[:, 0] * batch.x.abs().sum(1)).abs().sqrt()
        return values

    strategy, log = new_strategy(), Log(tmp_path, quiet=True)
    arguments = {
        "config": config(on_nonfinite=mode, checkpoint={"every_images": 80}),
        "optim": OPTIM,
        "strategy": strategy,
        "batches": faulty,
        "losses": rooted,
        "world": ALONE,
        "log": log,
        "checkpoints": tmp_path / "checkpoints",
        "stopper": Stopper(),
    }
    layer = "layer `0`" if where == "loss" else "the backward pass"
    samples = "samples s67" if where == "loss" else "samples s64, s65"
    if mode == "stop":
        with pytest.raises(UserError, match=r"step 4 \(images 64 to 80\)") as caught:
            run_loop(**arguments)
        assert layer in str(caught.value) and samples in str(caught.value)
        assert latest_checkpoint(tmp_path / "checkpoints") is None
        expected = 4
    else:
        assert run_loop(**arguments).images_seen == 160
        text = (tmp_path / "log.txt").read_text()
        assert layer in text and samples in text and text.count("not finite") == 1
        path = latest_checkpoint(tmp_path / "checkpoints")
        assert load_checkpoint(path, new_strategy())["loop"]["skipped"] == 1
        expected = 9
    steps = {float(state["step"]) for state in strategy.optimizer.state.values()}
    assert steps == {float(expected)}


def test_batches_that_do_not_divide_are_refused_with_the_field_to_set() -> None:
    with pytest.raises(UserError, match="loop.micro_batch=8 times 3 rank"):
        config().accumulation(3)
    assert config().accumulation(2) == 1 and config(micro_batch=2).accumulation(4) == 2
