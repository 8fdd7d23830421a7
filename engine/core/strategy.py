"""The step protocol that training talks to, its configuration, and what both strategies share.

One training step is `accumulation` times (forward, `backward(loss)`) and then `step(lr)`. Two
strategies implement it: plain torch (`strategy_local.py`) and DeepSpeed ZeRO (`strategy_zero.py`).
Both keep float32 master weights, both update through `AdamWEMA`, and both describe their state as
`Fragment`s by parameter name, which is all that a checkpoint knows.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import model_validator
from torch import Tensor, nn

from .config import Config, option
from .distributed import World
from .errors import UserError
from .optim import AdamWEMA, OptimConfig, profile_name, profile_state

_BUCKET = 1 << 25  # elements per collective: 128 MiB of float32


class StrategyConfig(Config):
    """Who runs the step: plain torch or DeepSpeed, sharding, precision, offload."""

    kind: Literal["zero", "local"] = option(
        "zero", "zero: DeepSpeed ZeRO; local: plain torch", affects_result=False
    )
    stage: Literal[0, 1, 2, 3] | None = option(
        None,
        "what zero shards: 1 optimizer state, 2 and gradients, 3 and weights (1 when not given)",
        affects_result=False,
    )
    precision: Literal["fp32", "bf16"] = option(
        "fp32", "type of weights and activations in forward and backward; masters are fp32"
    )
    offload: bool = option(
        False, "keep optimizer state and master weights in host memory", affects_result=False
    )

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> "StrategyConfig":
        if self.kind == "local" and (self.offload or self.stage):
            raise ValueError(
                "stage and offload have no effect with kind local; remove them or type kind=zero"
            )
        if self.offload and self.stage == 0:
            raise ValueError("offload needs stage 1, 2 or 3; type stage=1")
        return self


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one tensor's state, a live view of the memory that holds it.

    Attributes:
        name: the parameter's or buffer's name in the model.
        state: "weight" (float32 master), "exp_avg", "exp_avg_sq", "ema0", ..., or "step".
        start: first element of the range in the flattened tensor.
        data: 1-d tensor, the elements.
        shape: shape of the whole tensor ("step": empty).
    """

    name: str
    state: str
    start: int
    data: Tensor
    shape: tuple[int, ...]


class Reader(Protocol):
    """What `load_fragments` reads from."""

    def read(self, name: str, state: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a flattened tensor, 1-d, on the CPU."""


class Strategy(Protocol):
    """Forward, backward, step, and access to the state by name.

    Attributes:
        grad_norm: 0-d float32 device tensor, global norm of the last step's averaged gradient
            before clipping; not synchronised here.
        notes: sentences for the person at the start, such as a stage that was changed.
        nonfinite: 0-d bool device tensor: the last step met a non-finite loss or gradient on some
            rank and left weights, moments, averages and step counts untouched.
        profiles: "raw" and one "ema:<decay>" per average.
    """

    world: World
    grad_norm: Tensor
    nonfinite: Tensor
    profiles: list[str]
    notes: list[str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the wrapped model; inputs are passed on as they are."""

    def backward(self, loss: Tensor) -> None:
        """Backward of the mean loss of one micro batch; divides by the accumulation itself."""

    def step(self, lr: float) -> None:
        """Average gradients over ranks, guard, clip, AdamW and EMA, clear gradients."""

    def refuse(self, bad: Tensor) -> None:
        """Make the coming step change nothing where `bad` (0-d bool) is true on some rank."""

    def weights(
        self, profile: str, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[nn.Module]:
        """The model in eval mode with a profile's weights in full; all ranks enter together.

        Args:
            dtype: of its trainable weights; by default that of forward.
        """

    def fragments(self) -> Iterator[Fragment]:
        """What this rank saves; over all ranks every element appears at least once."""

    def load_fragments(self, reader: Reader) -> None:
        """Fill all state from `reader`, and the weights that forward uses."""

    def inventory(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(name, state) -> shape of everything that a checkpoint of this strategy holds."""


def build_strategy(
    config: StrategyConfig,
    model: nn.Module,
    optim_config: OptimConfig,
    world: World,
    accumulation: int = 1,
    micro_batch: int = 1,
) -> Strategy:
    """The strategy that a recipe's section describes, wrapping `model` (moved to the device).

    Args:
        accumulation: backward calls per step.
        micro_batch: samples per rank and backward call; only DeepSpeed's own bookkeeping uses it.
    """
    if accumulation < 1:
        raise UserError(f"accumulation must be at least 1, not {accumulation}")
    if config.kind == "local":
        from .strategy_local import LocalStrategy

        return LocalStrategy(config, model, optim_config, world, accumulation)
    from .strategy_zero import ZeroStrategy

    return ZeroStrategy(config, model, optim_config, world, accumulation, micro_batch)


class StrategyBase:
    """What both strategies do alike: profiles, full weights for a while, loading."""

    optimizer: AdamWEMA

    def __init__(
        self, model: nn.Module, optim: OptimConfig, world: World, accumulation: int
    ) -> None:
        self.world, self.optim, self.accumulation = world, optim, accumulation
        self.profiles, self.notes = optim.profiles, []
        self.profile_states = {p: profile_state(p, optim.ema) for p in self.profiles}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self._other_shapes = {
            name: tuple(tensor.shape)
            for name, tensor in [*model.named_parameters(), *persistent_buffers(model).items()]
            if name not in self.trainable
        }
        self.aliases = tied_names(model)
        self._skeleton = skeleton(model)
        self.grad_norm = torch.zeros((), device=world.device)
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=world.device)
        self._loss_bad = torch.zeros((), dtype=torch.bool, device=world.device)
        if not self.trainable:
            raise UserError("the model has no trainable parameter")

    def refuse(self, bad: Tensor) -> None:
        """Make the coming step change nothing where `bad` (0-d bool) is true on some rank."""
        self._loss_bad = self._loss_bad | bad

    def inventory(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(name, state) -> shape of everything that a checkpoint of this strategy holds."""
        averages = [f"ema{i}" for i in range(len(self.optim.ema))]
        held = {(name, "weight"): shape for name, shape in self._other_shapes.items()}
        for name in self.trainable:
            for state in ("weight", "exp_avg", "exp_avg_sq", *averages):
                held[name, state] = self.shapes[name]
            held[name, "step"] = ()
        return held

    def views(self) -> Iterator[Fragment]:
        """Every range of state in this rank's memory, replicated ones included."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Copy master weights to the weights that forward uses."""
        raise NotImplementedError

    @torch.no_grad()
    def load_fragments(self, reader: Reader) -> None:
        """See `Strategy.load_fragments`."""
        for view in self.views():
            view.data.copy_(reader.read(view.name, view.state, view.start, view.data.numel()))
        self.optimizer.steps_changed()
        self.refresh()

    @contextmanager
    def weights(self, profile: str, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        """See `Strategy.weights`; the module is a copy, so training state cannot be harmed."""
        state = profile_state(profile, self.optim.ema)
        module = self._skeleton
        dtype = dtype or self.compute_dtype
        full = {name: value.to(dtype) for name, value in self.full(state)}
        try:
            place(module, full | self._others())
            module.eval()
            yield module
        finally:
            place(module, {n: torch.empty(s, device="meta") for n, s in self.shapes.items()})

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of weights in forward."""
        return torch.float32

    def _others(self) -> dict[str, Tensor]:
        """Buffers and frozen weights as they are now."""
        return {}

    def full(self, state: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor on the device) of every trainable parameter's state.

        Ranks add their disjoint ranges into zeros, in buckets, so it is exact.
        """
        pieces: dict[str, list[Fragment]] = {name: [] for name in self.trainable}
        for view in self.views():
            if view.state == state and view.name in pieces:
                pieces[view.name].append(view)
        for names in buckets(self.trainable, self.shapes):
            sizes = [math.prod(self.shapes[name]) for name in names]
            flat = torch.zeros(sum(sizes), device=self.world.device)
            parts = flat.split(sizes)
            for name, part in zip(names, parts, strict=True):
                for piece in pieces[name]:
                    part[piece.start : piece.start + piece.data.numel()].copy_(piece.data)
            if self.sharded and self.world.size > 1:
                dist.all_reduce(flat, group=self.world.group)
            yield from (
                (n, part.reshape(self.shapes[n])) for n, part in zip(names, parts, strict=True)
            )

    @property
    def sharded(self) -> bool:
        """Whether `views` of different ranks are disjoint ranges instead of copies."""
        return False


def buckets(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Consecutive names whose tensors together stay near a fixed size; order is the model's."""
    bucket, size = [], 0
    for name in names:
        bucket.append(name)
        size += math.prod(shapes[name])
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def even_share(view: Fragment, rank: int, size: int) -> Fragment | None:
    """The part of a replicated range that one rank saves; None where it has nothing to save."""
    count = view.data.numel()
    first, last = count * rank // size, count * (rank + 1) // size
    if first == last:
        return None
    return Fragment(view.name, view.state, view.start + first, view.data[first:last], view.shape)


def optimizer_views(
    name: str, shape: tuple[int, ...], optimizer: AdamWEMA, master: nn.Parameter
) -> Iterator[Fragment]:
    """Master weight, moments, averages and step count of one whole parameter."""
    state = optimizer.state[master]
    yield Fragment(name, "weight", 0, master.detach().view(-1), shape)
    for key in optimizer.state_names:
        yield Fragment(name, key, 0, state[key].view(-1), shape)
    yield Fragment(name, "step", 0, state["step"].view(-1), ())


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict, by name."""
    names = set(model.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Other names of shared parameters: alias -> the name under which it is stored."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters take no memory until `place` fills them."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo=empty)


def place(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, tied names included."""
    tied = tied_names(module)
    for name, tensor in [*tensors.items(), *((a, tensors[n]) for a, n in tied.items())]:
        owner, _, leaf = name.rpartition(".")
        target = module.get_submodule(owner)
        if leaf in target._parameters:
            # tied modules must keep sharing one Parameter object
            if name in tied:
                first, _, tail = tied[name].rpartition(".")
                target._parameters[leaf] = module.get_submodule(first)._parameters[tail]
            else:
                target._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            target._buffers[leaf] = tensor


__all__ = ["Fragment", "Strategy", "StrategyConfig", "build_strategy", "profile_name"]
