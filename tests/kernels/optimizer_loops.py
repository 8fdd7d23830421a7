"""Training loops that are not Etude's, for test_optimizer_loops.py; of two ranks: DDP and FSDP2.

`python optimizer_loops.py FILE` writes what `every` returns for `ddp` and `fsdp2`, from rank 0.
Each loop is run three times: with torch's AdamW and a plain average beside it, with `AdamWEMA`, and
with the bare operator on state of one's own.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from etude import AdamWEMA
from etude.kernels import adamw_ema

STEPS, DECAY = 8, 0.9
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WAYS = ("torch", "AdamWEMA", "adamw_ema")
Result = tuple[list[float], list[Tensor]]  # losses by step; averages in the parameters' order


class Net(nn.Module):
    """Sizes that no number of ranks divides, and one that leaves ranks without an element."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 3)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.inner(x)))) * self.scale


def new_net() -> Net:
    torch.manual_seed(1)
    return Net()


def batches(rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of each step's batch: inputs and targets."""
    for step in range(STEPS):
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        yield (
            x[rank::ranks],
            torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3]], 1)[rank::ranks],
        )


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def decay_of(step: int) -> float:
    """The warm-up of `AdamWEMA`."""
    return min(DECAY, (1 + step) / (10 + step))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


class PlainAverage:
    """torch's optimizer and the average that people write after it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.optimizer = torch.optim.AdamW(parameters, **ADAMW)
        self.parameters, self.steps = parameters, 0
        self.averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.mul_(decay_of(self.steps)).add_(parameter, alpha=1 - decay_of(self.steps))
        self.steps += 1
        self.optimizer.zero_grad()


class BareOperator:
    """The operator without an optimizer around it, on the shards of this rank."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.taken = parameters, 0
        shards = [local(p) for p in parameters]
        self.moments = [[torch.zeros_like(s) for s in shards] for _ in range(2)]
        self.averages = [p.detach().clone() for p in parameters]
        self.steps = [torch.zeros(()) for _ in shards]

    def step(self) -> None:
        adamw_ema(
            [local(p) for p in self.parameters], [local(p.grad) for p in self.parameters],
            *self.moments, [[local(a) for a in self.averages]], self.steps,
            ema_decays=[decay_of(self.taken)], **ADAMW,
        )  # fmt: skip
        self.taken += 1
        for parameter in self.parameters:
            parameter.grad = None


class WithAverages:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.optimizer = AdamWEMA(parameters, ema_decays=[DECAY], **ADAMW)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def averages(self) -> list[Tensor]:
        return list(self.optimizer.ema_state(0).values())


MAKERS = dict(zip(WAYS, (PlainAverage, WithAverages, BareOperator), strict=True))


def train(way: str, wrap: Callable[[nn.Module], nn.Module], rank: int, ranks: int) -> Result:
    net = wrap(new_net())
    optimizer = MAKERS[way](list(net.parameters()))
    losses = []
    for batch in batches(rank, ranks):
        loss = loss_of(net, batch)
        loss.backward()
        optimizer.step()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(float(loss) / ranks)
    whole = [a.full_tensor() if hasattr(a, "full_tensor") else a for a in optimizer.averages]
    return losses, whole


def every(wrap: Callable[[nn.Module], nn.Module], rank: int, ranks: int) -> dict[str, Result]:
    return {way: train(way, wrap, rank, ranks) for way in WAYS}


def main(file: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))

    def sharded(net: nn.Module) -> nn.Module:
        fully_shard(net, mesh=mesh)
        return net

    found = {
        "ddp": every(DistributedDataParallel, rank, ranks),
        "fsdp2": every(sharded, rank, ranks),
    }
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
