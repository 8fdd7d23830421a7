"""The training loop: data, step, log, evaluate, save, stop; `training/` gives it the loss.

It is the one place where progress advances. Progress is `images_seen`; every interval is in images
and is met at the first step that reaches it, so the global batch need not divide it. The host reads
two flags, "a value was not finite" and "somebody asked us to stop", one step after they were set on
the device and agreed by all ranks: it never waits for the step it has just launched.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointConfig, prune_checkpoints, save_checkpoint
from .config import Config, option
from .distributed import World, exchange
from .errors import UserError
from .log import Log
from .optim import OptimConfig, learning_rate
from .signals import Stopper
from .strategy import Strategy


class LoopConfig(Config):
    """How long to train, in which batches, and how often to look, save and stop."""

    images: int = option(..., "training length", unit="images", gt=0)
    global_batch: int = option(..., "pictures per optimizer step over all ranks", gt=0)
    micro_batch: int = option(
        ...,
        "pictures per rank and forward pass; accumulation is derived",
        gt=0,
        affects_result=False,
    )
    log_every: int = option(..., "log interval", unit="images", gt=0, affects_result=False)
    evaluate_every: int = option(
        ..., "held-out loss and sample grid interval", unit="images", gt=0, affects_result=False
    )
    max_minutes: float | None = option(
        None,
        "save and stop after this time; null for no limit",
        unit="minutes",
        gt=0,
        affects_result=False,
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "what to do when a loss or gradient is not finite; no state changes either way"
    )
    checkpoint: CheckpointConfig = option(CheckpointConfig(), "when to save and what to keep")

    def accumulation(self, world_size: int) -> int:
        """Micro batches per step and rank; refuses batches that do not divide."""
        share = self.micro_batch * world_size
        if self.global_batch % share:
            raise UserError(
                f"loop.global_batch={self.global_batch} is not a multiple of loop.micro_batch="
                f"{self.micro_batch} times {world_size} rank(s): set loop.micro_batch to a divisor "
                f"of {self.global_batch // world_size or 1}"
            )
        return self.global_batch // share


@dataclass(frozen=True)
class Outcome:
    """Why the loop returned: `stopped` is None after the last image, else the reason."""

    images_seen: int
    stopped: str | None


class _Verdict:
    """Flags that all ranks agree on, copied to the host behind the next step's work."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.flags = torch.zeros(2, device=world.device)
        self.host = torch.zeros(2, pin_memory=world.device.type == "cuda")
        self.ready: torch.cuda.Event | None = None

    def post(self, nonfinite: Tensor, stop: bool) -> None:
        self.flags = torch.stack([nonfinite.float(), nonfinite.new_full((), stop).float()])
        if self.world.size > 1:
            torch.distributed.all_reduce(self.flags, torch.distributed.ReduceOp.MAX)
        self.host.copy_(self.flags, non_blocking=True)
        if self.world.device.type == "cuda":
            self.ready = torch.cuda.Event()
            self.ready.record()

    def take(self) -> tuple[bool, bool]:
        """(not finite, stop) of the last step; a value that was not finite is told once."""
        if self.ready is not None:
            self.ready.synchronize()
        nonfinite, stop = bool(self.host[0]), bool(self.host[1])
        self.host[0] = 0.0
        return nonfinite, stop


class _Meter:
    """Finite losses and waiting time since the last log line; sums stay on the device.

    A checkpoint between two log lines carries the sums, so the next line of a resumed run is the
    one that an uninterrupted run writes.
    """

    def __init__(self, world: World, sums: Sequence[float] = (0.0, 0.0)) -> None:
        mine = sums if world.rank == 0 else (0.0, 0.0)
        self.world = world
        self.sums = torch.tensor(mine, dtype=torch.float64, device=world.device)
        self.images = 0
        self.wait_seconds = 0.0
        self.started = time.monotonic()

    def add(self, losses: Tensor, wait_seconds: float) -> None:
        """Count one micro batch's per-sample losses (B,)."""
        losses = losses.detach().double()
        finite = torch.isfinite(losses)
        self.sums += torch.stack([losses.where(finite, 0.0).sum(), finite.double().sum()])
        self.images += len(losses)
        self.wait_seconds += wait_seconds

    def totals(self) -> list[float]:
        """Sum and number of the finite losses of all ranks."""
        sums = self.sums.clone()
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        return sums.tolist()

    def read(self) -> dict[str, float]:
        """Mean loss over all ranks, images per second of the job, share of time spent waiting."""
        total, count = self.totals()
        seconds = time.monotonic() - self.started
        return {
            "loss": total / count if count else math.nan,
            "images_per_second": self.images * self.world.size / seconds,
            "data_wait_percent": 100.0 * self.wait_seconds / seconds,
        }


def run_loop(
    *,
    config: LoopConfig,
    optim: OptimConfig,
    strategy: Strategy,
    batches: Callable[[int], Iterator],
    losses: Callable[[Callable, object], Tensor],
    world: World,
    log: Log,
    checkpoints: Path,
    stopper: Stopper,
    start: int = 0,
    resumed: Mapping[str, Any] | None = None,
    extra: Callable[[], dict] = dict,
    evaluate: Callable[[int], float | None] = lambda images_seen: None,
) -> Outcome:
    """Train from `start` to `config.images` or until stopped; saves on the way and at the end.

    Args:
        batches: start position -> endless iterator of this rank's micro batches in step order.
        losses: (forward, micro batch) -> per-sample losses (B,) float32.
        resumed: the "loop" entry of the checkpoint's extra that `start` belongs to.
        extra: what to store beside the tensors, for example the recipe.
        evaluate: called on every rank at the first step at or past each interval, and at the end;
            rank 0 returns the number (smaller is better) that `checkpoint.keep_best` goes by.

    Raises:
        UserError: a loss or gradient was not finite and `on_nonfinite` is "stop"; the message names
            the step, the samples and the first bad layer, and the state is that before the step.
    """
    accumulation, resumed = config.accumulation(world.size), resumed or {}
    images_seen, last_saved, stopped = start, start, None
    skipped, best = int(resumed.get("skipped", 0)), resumed.get("best")
    verdict, meter = _Verdict(world), _Meter(world, resumed.get("losses", (0.0, 0.0)))
    stream, previous = batches(start), []

    def stop_agreed() -> bool:
        """Read the last step's verdict: report what was not finite, tell whether to stop."""
        nonlocal skipped
        nonfinite, stop = verdict.take()
        if nonfinite:
            skipped += 1
            step_start = images_seen - config.global_batch
            _report_nonfinite(config, strategy, losses, previous, step_start, log)
        return stop

    def save() -> None:
        nonlocal last_saved
        if images_seen != last_saved:
            stop_agreed()  # a step that was not finite is told before a checkpoint passes it
            state = {"skipped": skipped, "losses": meter.totals(), "best": best}
            save_checkpoint(checkpoints, images_seen, strategy, extra() | {"loop": state}, world)
            if world.rank == 0:
                prune_checkpoints(checkpoints, config.checkpoint, best and best[1])
            last_saved = images_seen

    with (
        log.progress("training", config.images, done=images_seen) as progress,
        contextlib.closing(stream),
    ):
        while images_seen < config.images:
            current = []
            for _ in range(accumulation):
                batch = next(stream)
                per_sample = losses(strategy, batch)
                strategy.backward(per_sample.mean())
                current.append((batch, per_sample.detach()))

            if stop_agreed():
                stopped = stopper.requested or "another rank was asked to stop"
                break

            strategy.step(learning_rate(optim, images_seen, config.images))
            before, images_seen = images_seen, images_seen + config.global_batch
            verdict.post(strategy.nonfinite, stopper.requested is not None)
            previous = [batch for batch, _ in current]
            for batch, per_sample in current:
                meter.add(per_sample, batch.wait_seconds)

            if _due(config.log_every, before, images_seen, config.images):
                shown = meter.read()
                shown["grad_norm"] = float(strategy.grad_norm)
                shown["lr"] = learning_rate(optim, before, config.images)
                log.metrics("train", images_seen, **shown, skipped=skipped)
                progress.advance(0, loss=shown["loss"], wait=f"{shown['data_wait_percent']:.0f}%")
                meter = _Meter(world)
            if _due(config.evaluate_every, before, images_seen, config.images):
                value = evaluate(images_seen)
                if config.checkpoint.keep_best:
                    value = exchange(world, "evaluation", value)[0]
                    if value is not None and (best is None or value < best[0]):
                        best = [value, images_seen]
                        save()
            if _due(config.checkpoint.every_images, before, images_seen, config.images):
                save()
            progress.advance(config.global_batch)
    save()
    return Outcome(images_seen, stopped)


def _due(interval: int, before: int, now: int, end: int) -> bool:
    return now // interval > before // interval or now >= end


def _report_nonfinite(
    config: LoopConfig,
    strategy: Strategy,
    losses: Callable[[Callable, object], Tensor],
    batches: list,
    start: int,
    log: Log,
) -> None:
    """Says which step, samples and layer were not finite; raises unless told to skip."""
    world = strategy.world
    layer, keys = find_nonfinite(strategy, losses, batches)
    found = exchange(world, "not finite", [layer, keys])
    rank = next((r for r, (layer, _) in enumerate(found) if layer), None)
    where = "the backward pass (the forward pass is finite)" if rank is None else found[rank][0]
    if world.size > 1 and rank is not None:
        where += f" on rank {rank} ({world.hosts[rank]})"
    keys = [key for _, bad in found for key in bad]
    if not keys:
        keys = [key for batch in batches for key in batch.keys]
    sentence = (
        f"step {start // config.global_batch} (images {start} to {start + config.global_batch}) is "
        f"not finite, first in {where}; samples {', '.join(keys[:8])}"
        f"{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}"
    )
    if config.on_nonfinite == "stop":
        raise UserError(
            f"{sentence}; no weight was changed: look with `etude runs replay RUN --at {start}`, "
            "or go on without such steps with loop.on_nonfinite=skip"
        )
    log.warn(f"{sentence}; skipped")


def find_nonfinite(
    strategy: Strategy, losses: Callable[[Callable, object], Tensor], batches: list
) -> tuple[str, list[str]]:
    """Where these micro batches go wrong in forward: the first module, in the order of execution,
    whose output is not finite ("" when all is), and the keys of the samples whose loss is not.
    """
    found: list[str] = []
    keys: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                    found.append(f"layer `{name}`" if name else "the model's output")

        return hook

    with strategy.weights("raw") as model, torch.no_grad():
        hooks = [module.register_forward_hook(watch(n)) for n, module in model.named_modules()]
        try:
            for batch in batches:
                finite = torch.isfinite(losses(model, batch)).tolist()
                keys += [key for key, good in zip(batch.keys, finite, strict=True) if not good]
        finally:
            for hook in hooks:
                hook.remove()
    return (found[0] if found else "the loss" if keys else ""), keys
