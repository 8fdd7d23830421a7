"""AdamWEMA and adamw_ema in other people's loops, against torch's AdamW and a plain average there.

Losses and averages agree within float32: 8 steps, each a unit or two apart in some weights.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from etude import AdamWEMA

WORKER = Path(__file__).parent / "optimizer_loops.py"
spec = importlib.util.spec_from_file_location("optimizer_loops", WORKER)
loops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loops)


@pytest.fixture(scope="module")
def two_processes(run_ranks, tmp_path_factory) -> dict:
    """{loop: {way: (losses, averages)}} of two processes."""
    file = tmp_path_factory.mktemp("loops") / "found.pt"
    ended = run_ranks(2, WORKER, file)
    assert file.exists(), "".join(one.stderr[-4000:] for one in ended)
    return torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], list[Tensor]]:
    """torch's AdamW and a plain average in one process and plain torch."""
    net = loops.new_net()
    optimizer = loops.PlainAverage(list(net.parameters()))
    losses = []
    for batch in loops.batches():
        loss = loops.loss_of(net, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    return losses, optimizer.averages


def agree(found: tuple, want: tuple) -> None:
    assert found[0] == pytest.approx(want[0], rel=1e-5)
    for a, b in zip(found[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loop", ["ddp", "fsdp2"])
@pytest.mark.parametrize("way", ["AdamWEMA", "adamw_ema"])
def test_in_two_processes(two_processes, expected, loop: str, way: str) -> None:
    runs = two_processes[loop]
    agree(runs[way], runs["torch"])
    agree(runs[way], expected)  # half the batch on each rank is the whole batch in one process


def test_in_an_accelerate_loop(expected) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    net = loops.new_net()
    ours = AdamWEMA(net.parameters(), ema_decays=[loops.DECAY], **loops.ADAMW)
    net, optimizer = accelerator.prepare(net, ours)
    losses = []
    for batch in loops.batches():
        loss = loops.loss_of(net, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1e9)  # as such loops do; never reached
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    agree((losses, list(ours.ema_state(0).values())), expected)


def test_in_a_lightning_loop(expected, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = loops.new_net(), []

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = loops.loss_of(self.net, batch)
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> AdamWEMA:
            return AdamWEMA(self.net.parameters(), ema_decays=[loops.DECAY], **loops.ADAMW)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    task = Task()
    data = torch.utils.data.DataLoader(list(loops.batches()), batch_size=None)
    trainer.fit(task, data)
    ours: nn.Module = trainer.optimizers[0]
    agree((task.losses, list(ours.ema_state(0).values())), expected)
