"""DeepSpeed ZeRO, stages 0-3; the only file that imports deepspeed.

Chosen by `strategy.kind: zero`. DeepSpeed shards float32 masters, `AdamWEMA` updates the shards, so
moments and averages are sharded with them. DeepSpeed's configuration is generated here. Its
internals are touched in the few functions below that turn its flat partitions into ranges by
parameter name: stages 1 and 2 through the mapping it keeps on each parameter, stage 3 through the
positions of each parameter in its flat groups (with our own handling of the padding there).
"""

import contextlib
import io
import logging
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import World, local_caches
from .errors import UserError
from .optim import AdamWEMA, OptimConfig, param_groups
from .strategy import (
    Fragment,
    StrategyBase,
    StrategyConfig,
    even_share,
    optimizer_views,
    persistent_buffers,
)


def deepspeed_config(
    stage: int,
    config: StrategyConfig,
    optim: OptimConfig,
    world_size: int,
    accumulation: int,
    micro_batch: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration; nothing in it is kept by hand."""
    zero: dict[str, Any] = {"stage": stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # stage 0 in fp32 has no guard of DeepSpeed's own: there we clip and guard ourselves
        "gradient_clipping": optim.clip if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


class ZeroStrategy(StrategyBase):
    """See `strategy.Strategy`."""

    def __init__(
        self,
        config: StrategyConfig,
        model: nn.Module,
        optim: OptimConfig,
        world: World,
        accumulation: int = 1,
        micro_batch: int = 1,
    ) -> None:
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.stage = 1 if config.stage is None else config.stage
        model.to(world.device, torch.float32)
        for buffer in model.buffers():  # DeepSpeed casts them at some stages only
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(self.dtype)
        super().__init__(model, optim, world, accumulation)
        if self.stage == 0 and self.dtype == torch.bfloat16:
            # DeepSpeed's bf16 stage 0 takes one Adam step on zero gradients when it starts
            self.stage = 1
            self.notes.append("strategy: bf16 at stage 0 runs as stage 1 (same, less memory)")
        deepspeed = _import_deepspeed(world)
        exact = {}
        if self.dtype != torch.float32:
            exact = {n: p.detach().cpu().flatten() for n, p in model.named_parameters()}
            exact = {n: value.clone() for n, value in exact.items()}
        self.optimizer = AdamWEMA.from_config(param_groups(model), optim)
        settings = deepspeed_config(
            self.stage, config, optim, world.size, accumulation, micro_batch
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self._deepspeed = deepspeed
        self._pending = 0
        self.optimizer.initialize(self._flat_masters())
        if self.dtype != torch.float32:
            self._restore_masters(exact)

    @torch.no_grad()
    def _restore_masters(self, exact: dict[str, Tensor]) -> None:
        """Give masters and averages the weights as they were: DeepSpeed rounds them to bf16."""
        for view in self.views():
            if view.name in self.trainable and view.state.startswith(("weight", "ema")):
                last = view.start + view.data.numel()
                view.data.copy_(exact[view.name][view.start : last])

    def _flat_masters(self) -> list[nn.Parameter] | None:
        if self.stage == 0:
            return None
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    @property
    def compute_dtype(self) -> torch.dtype:
        """See `StrategyBase`."""
        return self.dtype

    @property
    def sharded(self) -> bool:
        """See `StrategyBase`."""
        return self.stage > 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the model."""
        return self.engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        if self._pending == self.accumulation:
            raise RuntimeError(f"{self.accumulation} backward calls are due before each step()")
        self._loss_bad = self._loss_bad | ~torch.isfinite(loss.detach())
        self.engine.backward(loss)
        self._pending += 1
        if self._pending < self.accumulation:
            self.engine.step()  # only counts the micro batch

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """See `Strategy.step`."""
        bad = self._loss_bad.float()
        if self.world.size > 1:
            dist.all_reduce(bad, group=self.world.group)
        bad = bad > 0
        if self.stage == 0:
            bad = self._guard_whole_gradients(bad)
        self.optimizer.found_inf = bad.float()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if self.stage > 0:
            norm = self.engine.get_global_grad_norm()
            self.grad_norm = torch.as_tensor(norm, device=self.world.device).float()
            # DeepSpeed found a non-finite gradient and did not call the optimizer
            bad = bad | torch.tensor(bool(self.engine.optimizer.overflow), device=bad.device)
        self.nonfinite = bad
        self._pending = 0
        self._loss_bad = torch.zeros_like(self._loss_bad)

    def _guard_whole_gradients(self, bad: Tensor) -> Tensor:
        """Stage 0: norm, clipping factor and finite check of the averaged gradients."""
        for parameter in self._trainable().values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in self._trainable().values()]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if self.optim.clip > 0:
            scale = torch.clamp(self.optim.clip / (self.grad_norm + 1e-6), max=1.0)
            self.optimizer.grad_scale = scale
        return bad | ~torch.isfinite(self.grad_norm)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.engine.module.named_parameters() if p.requires_grad}

    def views(self) -> Iterator[Fragment]:
        """See `StrategyBase`."""
        for name, parameter in self._trainable().items():
            if self.stage == 0:
                shape = self.shapes[name]
                yield from optimizer_views(name, shape, self.optimizer, parameter)
            elif self.stage == 3:
                yield from self._stage3_views(name, parameter)
            else:
                yield from self._mapped_views(name, parameter)
        for name, tensor in persistent_buffers(self.engine.module).items():
            yield Fragment(name, "weight", 0, tensor.detach().view(-1), tuple(tensor.shape))
        for name, parameter in self._frozen().items():
            if self.stage == 3:
                start, count = self._own_range(parameter, name)
                if count > 0:
                    data = parameter.ds_tensor.data[:count]
                    yield Fragment(name, "weight", start, data, self.shapes[name])
            else:
                yield Fragment(name, "weight", 0, parameter.data.view(-1), self.shapes[name])

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.engine.module.named_parameters() if not p.requires_grad}

    def _mapped_views(self, name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
        """Stages 1 and 2: DeepSpeed notes on each parameter where its range of the flat master is.

        We take the optimizer's state by that position; DeepSpeed's own links to it exist for the
        first group only when state is made late.
        """
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # wholly in another rank's partition
            return
        flat = self.engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.get_hp_fragment_address()
        start = mapping.lp_fragment_address.start
        yield from self._flat_views(name, flat, address.start, start, address.numel)

    def _stage3_views(self, name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
        """Stage 3: rank r holds elements [r k, (r + 1) k), k = ceil(size / ranks), then padding."""
        zero = self.engine.optimizer
        start, count = self._own_range(parameter, name)
        if count > 0:
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            yield from self._flat_views(name, flat, offset, start, count)

    def _own_range(self, parameter: nn.Parameter, name: str) -> tuple[int, int]:
        """First element and number of real elements of this rank's stage 3 partition."""
        length = parameter.ds_tensor.ds_numel
        start = length * self.world.rank
        return start, min(length, _size(self.shapes[name]) - start)

    def _flat_views(
        self, name: str, flat: nn.Parameter, offset: int, start: int, count: int
    ) -> Iterator[Fragment]:
        shape, state = self.shapes[name], self.optimizer.state[flat]
        data = flat.detach().narrow(0, offset, count)
        yield Fragment(name, "weight", start, data, shape)
        for key in self.optimizer.state_names:
            yield Fragment(name, key, start, state[key].narrow(0, offset, count), shape)
        yield Fragment(name, "step", 0, state["step"].view(-1), ())

    def fragments(self) -> Iterator[Fragment]:
        """See `Strategy.fragments`; replicated state is shared out evenly over the ranks."""
        sharded = set(self.trainable) if self.stage > 0 else set()
        sharded |= set(self._frozen()) if self.stage == 3 else set()
        for view in self.views():
            share = view
            if view.name not in sharded:
                share = even_share(view, self.world.rank, self.world.size)
            if share is not None:
                yield share

    @torch.no_grad()
    def refresh(self) -> None:
        """See `StrategyBase`."""
        if self.stage in (1, 2):
            parameters = self._trainable()
            for name, value in self.full("weight"):
                parameters[name].data.copy_(value)
        if self.stage == 3:
            zero = self.engine.optimizer
            zero._partition_all_parameters()
            for view in self.views():
                if view.state == "weight" and view.name in self.trainable:
                    parameter = self.engine.module.get_parameter(view.name)
                    parameter.ds_tensor.data[: view.data.numel()].copy_(view.data)
            if zero.persistent_parameters:  # small ones that DeepSpeed keeps whole between steps
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _others(self) -> dict[str, Tensor]:
        buffers = persistent_buffers(self.engine.module)
        frozen = self._frozen()
        if self.stage == 3 and frozen:
            with self._deepspeed.zero.GatheredParameters(list(frozen.values())):
                return buffers | {name: p.data.clone() for name, p in frozen.items()}
        return buffers | {name: p.data for name, p in frozen.items()}


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed quietly, with node-local build caches and a process group to use."""
    local_caches()
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise UserError(
            f"strategy.kind=zero needs DeepSpeed ({error}); type `pip install deepspeed`, or "
            "strategy.kind=local"
        ) from None
    logger.setLevel(logging.WARNING)
    logger.addFilter(_worth_showing)
    # DeepSpeed still calls torch's old names of collectives, once per bucket
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    built = list(Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*shm_comm*.so"))
    if world.device.type == "cpu" and not built and world.local_rank == 0:
        print("building DeepSpeed's CPU communication operator (once, about half a minute)")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # one "built successfully" line per rank
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"DeepSpeed cannot build its communication operator ({str(error).splitlines()[0]}); "
            "install a C++ compiler (apt install g++), or type strategy.kind=local"
        ) from None
    return deepspeed


def _worth_showing(record: logging.LogRecord) -> bool:
    """Drop two warnings: our optimizer is tested, and a skipped step is our own `nonfinite`."""
    message = record.getMessage()
    return "untested optimizer" not in message and "OVERFLOW! Skipping step" not in message
