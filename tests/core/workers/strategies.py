"""One rank of some: `strategies.py PHASE FOLDER`; writes FOLDER/PHASE-<rank>.pt."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from etude.core import distributed
from etude.core.checkpoint import load_checkpoint, save_checkpoint
from etude.core.distributed import World
from etude.core.optim import AdamWEMA, OptimConfig, param_groups
from etude.core.strategy import Strategy, StrategyConfig, build_strategy

STEPS, ACCUMULATION, GLOBAL_BATCH = 20, 2, 24
OPTIM = OptimConfig(lr=3e-3, weight_decay=0.1, clip=0.5, ema=[0.9, 0.999])


class Net(nn.Module):
    """Odd sizes, decayed and undecayed parameters, a frozen weight, a buffer, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 33)
        self.inner = nn.Linear(7, 33)
        self.norm = nn.LayerNorm(33)
        self.middle = nn.Linear(33, 33)
        self.again = nn.Linear(33, 33, bias=False)
        self.again.weight = self.middle.weight
        self.out = nn.Linear(33, 3)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 33), requires_grad=False)
        self.register_buffer("shift", torch.linspace(-1, 1, 33))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = self.inner(x.to(self.scale.dtype)) + self.table(label)
        x = torch.tanh(self.norm(x) * self.frozen + self.shift)
        x = x + torch.tanh(self.again(torch.tanh(self.middle(x))))
        return self.out(x) * self.scale


def new_net() -> Net:
    torch.manual_seed(11)
    return Net()


def micro_batch(step: int, index: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slice `index` of `count` of the global batch of a step: inputs, labels, targets."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, 7, generator=generator)
    label = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)
    target = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), label / 5.0], dim=1)
    size = GLOBAL_BATCH // count
    part = slice(index * size, (index + 1) * size)
    return x[part], label[part], target[part]


def loss_of(net: object, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, label, target = batch
    return (net(x, label).float() - target).square().mean()


def train(strategy: Strategy, first: int, last: int) -> list[float]:
    """Steps first..last-1; the global batch's mean loss of each, equal on all ranks."""
    world, losses = strategy.world, []
    for step in range(first, last):
        total = torch.zeros(())
        for i in range(ACCUMULATION):
            batch = micro_batch(step, i * world.size + world.rank, ACCUMULATION * world.size)
            loss = loss_of(strategy, batch)
            strategy.backward(loss)
            total += loss.detach() / ACCUMULATION
        strategy.step(OPTIM.lr)
        parts = distributed.exchange(world, "loss", total.item())
        losses.append(sum(parts) / world.size)
    return losses


def build(world: World, kind: str, stage: int | None, precision: str = "fp32", offload=False):
    config = StrategyConfig(kind=kind, stage=stage, precision=precision, offload=offload)
    micro = GLOBAL_BATCH // ACCUMULATION // world.size
    return build_strategy(config, new_net(), OPTIM, world, ACCUMULATION, micro)


def state_of(strategy: Strategy) -> dict[str, Tensor]:
    """Bitwise copy of everything this rank holds."""
    return {f"{v.name}|{v.state}|{v.start}": v.data.clone() for v in strategy.views()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def check_guard(strategy: Strategy) -> dict[str, bool]:
    """A NaN gradient on the last rank only, an infinite loss with finite gradients, a good step."""
    world, before = strategy.world, state_of(strategy)
    report = {}
    for fault in ("gradient", "loss", "none"):
        for i in range(ACCUMULATION):
            loss = loss_of(strategy, micro_batch(50, i, ACCUMULATION))
            if world.rank == world.size - 1 and i == 0 and fault == "gradient":
                loss = loss * float("nan")
            if world.rank == world.size - 1 and i == 0 and fault == "loss":
                loss = loss + float("inf")
            strategy.backward(loss)
        strategy.step(OPTIM.lr)
        report[f"{fault} flagged"] = bool(strategy.nonfinite)
        report[f"{fault} untouched"] = same(before, state_of(strategy))
    with strategy.weights("raw") as module:
        report["finite"] = all(bool(p.isfinite().all()) for p in module.parameters())
    return report


class Dot(nn.Module):
    """Loss whose gradient with respect to each parameter is a given tensor, exactly."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shapes = [(5, 7), (3,), (11, 13), (1,), (17,), (2, 3, 5), (1, 1)]
        self.parts = nn.ParameterList(torch.randn(s, generator=generator) for s in shapes)

    def forward(self, grads: list[Tensor]) -> Tensor:
        return sum((p * g).sum() for p, g in zip(self.parts, grads, strict=True))


def averages(world: World, kind: str, stage: int | None) -> dict[str, Tensor]:
    """Weights and averages after 10 steps whose gradients are the same on every rank."""
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, ema=[0.9, 0.99])
    config = StrategyConfig(kind=kind, stage=stage)
    model = Dot()
    shapes = [p.shape for p in model.parts]
    strategy = build_strategy(config, model, optim, world)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randint(-64, 65, s, generator=generator) / 64.0 for s in shapes]
        strategy.backward(strategy(grads))
        strategy.step(1e-2)
    result = {}
    for profile in strategy.profiles:
        with strategy.weights(profile) as module:
            result |= {f"{profile} {n}": p.clone() for n, p in module.named_parameters()}
    return result


def sharded_library_use(world: World) -> dict[str, Tensor]:
    """AdamWEMA alone under FSDP2, in someone else's loop."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = new_net()
    net.frozen.requires_grad_(True)  # FSDP2 shards what it is given
    fully_shard(net, mesh=init_device_mesh("cpu", (world.size,)))
    optimizer = AdamWEMA(param_groups(net), lr=1e-2, weight_decay=0.1, ema_decays=[0.9])
    for step in range(5):
        loss_of(net, micro_batch(step, 0, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: ema.full_tensor() for p, ema in optimizer.ema_state(0).items()}


def phase_one(world: World, folder: Path) -> dict:
    """One rank: losses of every strategy, a checkpoint of ZeRO-3 with what follows it."""
    losses = {
        f"{kind} {stage} {precision}": train(build(world, kind, stage, precision), 0, STEPS)
        for precision in ("fp32", "bf16")
        for kind, stage in [("local", None), ("zero", 0), ("zero", 1), ("zero", 2), ("zero", 3)]
    }
    strategy = build(world, "zero", 3)
    train(strategy, 0, 10)
    save_checkpoint(folder / "one", 10, strategy, {"from": "one"}, world)
    return {
        "losses": losses,
        "after": train(strategy, 10, 15),
        "guard": guards(world),
        "resumed": {f"{k} {s}": resume(world, k, s, folder) for k, s in [("zero", 1), ("zero", 3)]},
    }


def resume(world: World, kind: str, stage: int | None, folder: Path) -> bool:
    """Whether 20 steps, a stop and 20 more leave the same bits as 40 steps."""
    straight = build(world, kind, stage)
    train(straight, 0, 40)
    first = build(world, kind, stage)
    train(first, 0, 20)
    path = save_checkpoint(folder / f"{kind}{stage}", 20, first, {}, world)
    second = build(world, kind, stage)
    load_checkpoint(path, second)
    train(second, 20, 40)
    return same(state_of(straight), state_of(second))


def guards(world: World) -> dict[str, dict[str, bool]]:
    kinds = [("local", None), ("zero", 0), ("zero", 1), ("zero", 2), ("zero", 3)]
    report = {f"{k} {s} fp32": check_guard(build(world, k, s)) for k, s in kinds}
    bf16 = {f"{k} {s} bf16": check_guard(build(world, k, s, "bf16")) for k, s in kinds if s != 0}
    return report | bf16


def phase_two(world: World, folder: Path) -> dict:
    """Two ranks: losses, guards, averages, FSDP2, checkpoints from and to other shapes."""
    combinations = [("local", None), ("zero", 0), ("zero", 1), ("zero", 2), ("zero", 3)]
    report: dict = {
        "losses": {
            f"{kind} {stage} {precision}": train(build(world, kind, stage, precision), 0, STEPS)
            for precision in ("fp32", "bf16")
            for kind, stage in combinations
        },
        "offload": train(build(world, "zero", 2, offload=True), 0, STEPS),
        "guard": guards(world),
        "averages": {str(stage): averages(world, "zero", stage) for stage in (1, 2, 3)},
        "averages local": averages(world, "local", None),
        "fsdp2": sharded_library_use(world),
        "loaded": {},
    }
    for kind, stage in combinations:
        strategy = build(world, kind, stage)
        train(strategy, 30, 32)  # a state that loading must replace
        load_checkpoint(folder / "one" / "step-000000000010", strategy)
        with torch.no_grad():
            first = loss_of(strategy, micro_batch(10, 0, 1)).item()
        report["loaded"][f"{kind} {stage}"] = [first, *train(strategy, 10, 15)]
    strategy = build(world, "zero", 1)
    train(strategy, 0, 10)
    save_checkpoint(folder / "two", 10, strategy, {"from": "two"}, world)
    with torch.no_grad():
        report["first"] = loss_of(strategy, micro_batch(10, 0, 1)).item()
    report["after"] = train(strategy, 10, 15)
    with strategy.weights("ema:0.999") as module:
        report["ema"] = {n: p.clone() for n, p in module.named_parameters()}
    save_checkpoint(folder / "two", 15, strategy, {}, world)
    return report


def phase_back(world: World, folder: Path) -> dict:
    """One rank again: what two ranks saved at ZeRO-1."""
    loaded = {}
    for kind, stage in [("local", None), ("zero", 0), ("zero", 1), ("zero", 3)]:
        strategy = build(world, kind, stage)
        extra = load_checkpoint(folder / "two" / "step-000000000010", strategy)
        with torch.no_grad():
            first = loss_of(strategy, micro_batch(10, 0, 1)).item()
        loaded[f"{kind} {stage}"] = [first, *train(strategy, 10, 15)]
    return {"loaded": loaded, "extra": extra}


def phase_three(world: World, folder: Path) -> dict:
    """Three ranks: averages again, and a checkpoint of two ranks."""
    loaded = {}
    for kind, stage in [("zero", 3), ("zero", 2)]:
        strategy = build(world, kind, stage)
        load_checkpoint(folder / "two" / "step-000000000010", strategy)
        loaded[f"{kind} {stage}"] = train(strategy, 10, 15)
    return {
        "averages": {str(stage): averages(world, "zero", stage) for stage in (1, 2, 3)},
        "loaded": loaded,
    }


if __name__ == "__main__":
    phase, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    here = distributed.start()
    run = {"one": phase_one, "two": phase_two, "back": phase_back, "three": phase_three}[phase]
    torch.save(run(here, out), out / f"{phase}-{here.rank}.pt")
    distributed.stop(here)
