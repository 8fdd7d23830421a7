"""Running statistics of a learner under several ranks, bad steps and the weight average.

Called by learner.py. A network's floating buffers (the running mean and variance of a batch
normalisation) are no parameters, so the optimizer neither averages them nor leaves them alone in a
step that it refuses, and a strategy hands out the newest ones beside any weights. Here they get
averages of their own, by the rule of the weights' average, are put back after a refused step, and
are taken over the whole global batch where several ranks share it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.strategy import persistent_buffers
from etude.models.batchnorm import BatchNorm, WideBuffers


class BufferAverages(WideBuffers):
    """The averages of a network's floating buffers.

    Each is `d average + (1 - d) buffer` with d = min(decay, (1 + step) / (10 + step)), as
    `core/optim.py` averages weights; `steps` counts the steps that were taken.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._names = [name for name, _ in _floating(network)]
        for name, buffer in _floating(network):
            self.register_buffer(_flat(name), buffer.detach().clone())

    @torch.no_grad()
    def update(self, network: nn.Module, refused: Tensor) -> None:
        """Take one step; where `refused` (0-d bool) is true, change nothing."""
        steps = self.steps.double()
        weight = 1.0 - torch.clamp((1.0 + steps) / (10.0 + steps), max=self.decay)
        weight = torch.where(refused, 0.0, weight).float()
        for name, buffer in _floating(network):
            average = getattr(self, _flat(name))
            average += weight.to(average.dtype) * (buffer - average)
        self.steps += ~refused

    def place(self, network: nn.Module) -> None:
        """Copy the averages into a network's buffers."""
        for name in self._names:
            owner, _, leaf = name.rpartition(".")
            buffer = network.get_submodule(owner)._buffers[leaf]
            buffer.copy_(getattr(self, _flat(name)))


class Averaged(nn.Module):
    """A network beside the averages of its buffers, so that a checkpoint holds both.

    They stand beside it because a container among the user's own networks would call a child.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network = network
        self.buffer_averages = BufferAverages(network, decay)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class RunningBuffers:
    """Keeps a learner's running statistics sound; one that has none costs nothing.

    Attributes:
        module: what is trained: the network, beside its averages if it has floating buffers.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = self.module = network
        self.averages: BufferAverages | None = None
        self._before: list[Tensor] = []
        if any(True for _ in _floating(network)):
            self.module = Averaged(network, decay)
            self.averages = self.module.buffer_averages

    def keep(self) -> None:
        """Remember the buffers as they are before a step."""
        if self.averages is not None:
            self._before = [buffer.clone() for _, buffer in _floating(self.network)]

    @torch.no_grad()
    def settle(self, refused: Tensor) -> None:
        """After a step: put them back where it was refused (0-d bool), then average them."""
        if self.averages is None:
            return
        for (_, buffer), before in zip(_floating(self.network), self._before, strict=True):
            buffer.copy_(torch.where(refused, before, buffer))
        self.averages.update(self.network, refused)


def without_averages(module: nn.Module, *, averaged: bool) -> nn.Module:
    """The network as its family builds it, of what `RunningBuffers` has trained.

    Args:
        averaged: put the averages in place; otherwise the newest buffers stay.
    """
    if not isinstance(module, Averaged):
        return module
    if averaged:
        module.buffer_averages.place(module.network)
    return module.network


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks, and of its gradients in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum:
    """`_SumOverRanks` of a group; copies of a network share it."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        return _SumOverRanks.apply(x, self._group)

    def __deepcopy__(self, memo: dict) -> "_Sum":
        return self


def normalise_over_ranks(network: nn.Module, world: World) -> None:
    """Let batch normalisations see the whole global batch; nothing to do on one rank.

    Raises:
        UserError: a batch normalisation of another library that trains, which would see its rank's
            share alone.
    """
    if world.size == 1:
        return
    for name, module in network.named_modules():
        if isinstance(module, BatchNorm):
            module.sum_over_ranks, module.ranks = _Sum(world.group), world.size
        elif isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            if module.training:
                raise UserError(
                    f"{name} is a {type(module).__name__} that would see one rank's pictures only: "
                    "use etude.models.batchnorm.BatchNorm there, or train on one process"
                )


def refuse_rounded_statistics(network: nn.Module) -> None:
    """To be called of a network that is to be made bf16.

    Raises:
        UserError: a batch normalisation of another library that trains, whose running statistics
            would be bf16 too and hardly move.
    """
    for name, module in network.named_modules():
        narrow = isinstance(module, _BatchNorm) and not isinstance(module, WideBuffers)
        if narrow and module.training and module.running_mean is not None:
            raise UserError(
                f"{name} is a {type(module).__name__} that would keep its running statistics in "
                "bf16: use etude.models.batchnorm.BatchNorm there, or type strategy.precision=fp32"
            )


def _floating(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The network's floating buffers that a checkpoint holds, by name."""
    for name, buffer in persistent_buffers(network).items():
        if buffer.is_floating_point():
            yield name, buffer


def _flat(name: str) -> str:
    return name.replace(".", "/")
