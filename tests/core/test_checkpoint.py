"""Checkpoints survive kills and faults; damaged and foreign ones are refused in one sentence."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from etude.core import checkpoint
from etude.core.checkpoint import (
    CheckpointConfig,
    disk_need,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_weights,
    save_checkpoint,
    save_cost,
    verify_checkpoint,
)
from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.optim import OptimConfig
from etude.core.strategy import StrategyConfig, build_strategy

WRITER = Path(__file__).parent / "workers" / "checkpoint_writer.py"
WORLD = World(0, 1, 0, torch.device("cpu"))


class Net(nn.Module):
    def __init__(self, width: int = 9, second: str = "out") -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.add_module(second, nn.Linear(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = list(self.children())[-1]
        return last(torch.relu(self.norm(self.inner(x))))


def build(model: nn.Module | None = None, ema: tuple[float, ...] = (0.9,), precision="fp32"):
    torch.manual_seed(3)
    config = StrategyConfig(kind="local", precision=precision)
    return build_strategy(config, model or Net(), OptimConfig(ema=list(ema)), WORLD)


def train(strategy, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        loss = (strategy(x) - x[:, :2]).square().mean()
        strategy.backward(loss)
        strategy.step(1e-2)
        losses.append(loss.item())
    return losses


def same_state(a, b) -> bool:
    pairs = list(zip(a.views(), b.views(), strict=True))
    return all(x.name == y.name and torch.equal(x.data, y.data) for x, y in pairs)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints at 5 and 10, and the strategy at 10."""
    strategy = build()
    for step in (5, 10):
        train(strategy, step - 5, step)
        save_checkpoint(tmp_path, step, strategy, {"note": step}, WORLD)
    return tmp_path, strategy


def test_forty_steps_are_twenty_a_stop_and_twenty_bitwise(tmp_path):
    straight, first, second = build(), build(), build()
    losses = train(straight, 0, 40)
    train(first, 0, 20)
    path = save_checkpoint(tmp_path, 20, first, {"note": "half"}, WORLD)
    assert load_checkpoint(path, second) == {"note": "half", "images_seen": 20}
    assert train(second, 20, 40) == losses[20:]
    assert same_state(straight, second)


def test_the_files_are_plain_safetensors_with_the_state(saved):
    folder, strategy = saved
    tensors = load_file(folder / "step-000000000010" / "rank-0of1.safetensors")
    for view in strategy.fragments():
        found = tensors[f"{view.name}|{view.state}|{view.start}"]
        assert torch.equal(found, view.data)
    assert len(tensors) == 6 * 5 + 3  # six parameters of five states, three buffers


def test_weights_of_a_profile_are_the_average(saved):
    folder, strategy = saved
    path = latest_checkpoint(folder)
    with strategy.weights("ema:0.9") as module:
        expected = {name: value.clone() for name, value in module.state_dict().items()}
    found = read_weights(path, "ema:0.9")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match=r"ema:0\.5.*raw, ema:0\.9"):
        read_weights(path, "ema:0.5")


def test_any_range_is_read(saved):
    folder, strategy = saved
    master = strategy.module.inner.weight.detach().flatten()
    with verify_checkpoint(folder / "step-000000000010") as opened:
        for start, length in [(0, 36), (7, 11), (35, 1)]:
            part = opened.read("inner.weight", "weight", start, length)
            assert torch.equal(part, master[start : start + length])
        with pytest.raises(UserError, match="no element 36"):
            opened.read("inner.weight", "weight", 30, 10)


def test_a_flipped_bit_anywhere_is_refused_and_the_older_one_used(saved):
    folder, _ = saved
    newest = folder / "step-000000000010"
    chance = random.Random(1)
    for member in sorted(newest.iterdir()):
        good = member.read_bytes()
        places = [0, 7, 8, 40, len(good) - 1, *chance.sample(range(len(good)), 40)]
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << chance.randrange(8)
            member.write_bytes(bad)
            with pytest.raises(UserError):
                verify_checkpoint(newest)
        with pytest.warns(UserWarning, match="step-000000000010"):
            assert latest_checkpoint(folder) == folder / "step-000000000005"
        member.write_bytes(good)
    assert latest_checkpoint(folder) == newest


def test_truncated_and_missing_files_are_refused(saved):
    folder, _ = saved
    newest = folder / "step-000000000010"
    for member in sorted(newest.iterdir()):
        good = member.read_bytes()
        for length in (0, 1, 9, len(good) // 2, len(good) - 1):
            member.write_bytes(good[:length])
            with pytest.raises(UserError, match=member.name):
                verify_checkpoint(newest, hashes=False)
        member.unlink()
        with pytest.raises(UserError, match=member.name):
            verify_checkpoint(newest)
        member.write_bytes(good)
    verify_checkpoint(newest)


@pytest.mark.parametrize(
    ("model", "ema", "words"),
    [
        (lambda: Net(width=8), (0.9,), r"inner\.weight is \[9, 4\] there and \[8, 4\] here"),
        (lambda: Net(second="oout"), (0.9,), r"oout\.bias \(nearest: out\.bias\)"),
        (Net, (0.9, 0.99), r"optimizer states differ: ema1 of inner\.bias"),
        (Net, (), r"optimizer states differ: ema0 of inner\.bias"),
        (lambda: nn.Linear(4, 2), (0.9,), r"only in it: inner\.bias"),
    ],
)
def test_foreign_checkpoints_are_refused_with_the_difference(saved, model, ema, words):
    folder, _ = saved
    stranger = build(model(), ema)
    before = [view.data.clone() for view in stranger.views()]
    with pytest.raises(UserError, match=words):
        load_checkpoint(folder / "step-000000000010", stranger)
    assert all(torch.equal(a, b.data) for a, b in zip(before, stranger.views(), strict=True))


def test_a_folder_of_another_kind_or_format_is_refused(saved, tmp_path):
    folder, strategy = saved
    with pytest.raises(UserError, match=r"no manifest\.json"):
        load_checkpoint(tmp_path, strategy)
    path = folder / "step-000000000010" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 99}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path.parent, strategy)
    path.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match="not the manifest"):
        load_checkpoint(path.parent, strategy)


def test_precision_may_change_between_runs(saved):
    folder, strategy = saved
    half = build(precision="bf16")
    load_checkpoint(folder / "step-000000000010", half)
    assert torch.equal(half.module.inner.weight, strategy.module.inner.weight.bfloat16())
    masters = {v.name: v.data for v in half.views() if v.state == "weight"}
    assert torch.equal(masters["inner.weight"], strategy.module.inner.weight.detach().flatten())


def test_retention_keeps_last_every_and_best(tmp_path):
    for step in (100, 150, 200, 250, 300, 350):
        (tmp_path / f"step-{step:012d}").mkdir()
    config = CheckpointConfig(keep_last=2, keep_every_images=200, keep_best=True)
    prune_checkpoints(tmp_path, config, best=150)
    kept = sorted(int(path.name[5:]) for path in tmp_path.iterdir())
    assert kept == [100, 150, 200, 300, 350]


def test_disk_and_time_statements(saved):
    folder, strategy = saved
    member = folder / "step-000000000010" / "rank-0of1.safetensors"
    parameters = sum(p.numel() for p in strategy.module.parameters())
    need = disk_need(4 * parameters, CheckpointConfig(keep_last=2))
    assert need.one == 4 * 4 * parameters
    assert need.peak == 3 * need.one
    header = int.from_bytes(member.read_bytes()[:8], "little")
    assert need.one <= member.stat().st_size - 8 - header <= need.one + 4 * 6 + 4 * 18 + 8
    cost = save_cost(675_000_000, 1, 8, largest_tensor=1152 * 6912)
    assert cost.bytes_per_rank == 1_350_000_000
    assert cost.seconds == pytest.approx(1.35)
    assert cost.peak_host_bytes == 4 * 1152 * 6912


def test_a_full_disk_is_noticed_before_anything_is_written(saved, monkeypatch):
    folder, strategy = saved
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0)
    )
    with pytest.raises(UserError, match="free space"):
        save_checkpoint(folder, 15, strategy, {}, WORLD)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000000000005", "step-000000000010"]


def run_writer(forks, *arguments: str) -> dict:
    done = forks.start(WRITER, *arguments)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def test_two_hundred_kills_lose_nothing(forks, tmp_path):
    report = run_writer(forks, "kills", str(tmp_path), "200")
    assert report["kills"] == 200
    assert report["caught in the act"] >= 40, "the kills must hit writers at work"
    assert report["newest"] >= 20


def test_one_fault_at_every_write_fsync_and_rename(forks, tmp_path):
    report = run_writer(forks, "faults", str(tmp_path))
    assert report["operations"] >= 40
    assert report["faults"] == 2 * report["operations"]
