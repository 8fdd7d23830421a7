"""Training a DiT end to end: Etude's own step beside the same model under torch.compile.

Run by `make gpu`; by hand: `python -m benchmarks.end_to_end --device cpu --model tiny --steps 3`.

Every provider trains the same model from the same weights on the same latents, noises, times and
labels, in bfloat16 with float32 masters, AdamW, and one weight average:

    etude            LocalStrategy: Etude's operators, gradient guard, clipping and AdamW+EMA
    torch_compile    torch's operators and its fastest attention under torch.compile and autocast,
                     torch's (fused) AdamW
    etude_compiled   as etude, the model compiled around Etude's operators
    torch_eager      as torch_compile, not compiled

Their losses must agree before a time counts. Pictures per second is over whole blocks of steps that
end in one synchronisation; slowest and fastest block are kept as the spread. One row a provider,
with the share of each kind of kernel in two profiled steps.

`--curve N` writes instead one row of N losses per provider, each step on data of its own: whether
etude differs from torch_compile by more than torch_compile from torch_eager, two baselines that sum
in different orders, is then read off `largest_difference`.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.case import ROOT, hash_of
from etude import kernels
from etude.core.distributed import World
from etude.core.optim import OptimConfig
from etude.core.strategy import StrategyConfig, build_strategy
from etude.diffusion.objectives import Objective, ObjectiveConfig
from etude.models.dit import DiT, DiTConfig

MODELS = {
    "tiny": ({"hidden_size": 48, "depth": 2, "num_heads": 4, "input_size": 8}, 4),
    "DiT-B/2": ({"preset": "DiT-B/2"}, 64),
    "DiT-XL/2": ({"preset": "DiT-XL/2"}, 32),
}  # sizes, and pictures per step
PROVIDERS = ("etude", "torch_compile", "etude_compiled", "torch_eager")
LR, EMA, WARM_UP, ROUNDS, SETS = 1e-4, 0.9999, 3, 3, 4
LARGEST_DRIFT = 0.03  # of the loss: bfloat16 weights against autocast, other sums
# Words in a kernel's name, first match wins; what no word is in counts as other.
KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa", "softmax"),
    "gemm": ("gemm", "nvjet", "cutlass", "addmm", "::mm", "bmm", "matmul", "linear"),
    "adaln": ("adaln", "gate_residual", "modulat", "layer_norm"),
    "activation": ("gelu", "silu"),
    "optimizer": ("adam", "lerp", "foreach", "multi_tensor"),
}


@dataclass(frozen=True)
class Job:
    """What all providers share."""

    name: str
    device: torch.device
    steps: int
    batch: int

    def model(self) -> DiT:
        model = DiT(DiTConfig(**MODELS[self.name][0], learn_sigma=False), seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the zero gates of a new DiT would hide its blocks
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        return model.to(self.device)

    def data(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Latents, noises, times and labels of the steps; reading data has its own benchmark."""
        generator, shape = torch.Generator().manual_seed(1), self.shape
        while True:
            latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
            times = torch.rand(self.batch, generator=generator)
            labels = torch.randint(0, 1000, (self.batch,), generator=generator)
            yield tuple(t.to(self.device) for t in (latents, noise, times, labels))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        config = DiTConfig(**MODELS[self.name][0])
        return (self.batch, config.in_channels, config.input_size, config.input_size)


def loss_of(forward: Callable, latents: Tensor, noise: Tensor, times: Tensor, labels: Tensor):
    objective = Objective(ObjectiveConfig())
    return objective.losses(
        lambda x, t, c: forward(x, t * 1000.0, c),
        latents, noise, times, {"labels": labels},
    ).mean()  # fmt: skip


def etude_step(job: Job, compiled: bool) -> Callable[..., Tensor]:
    model = job.model()
    if compiled:
        model.compile()
    strategy = build_strategy(
        StrategyConfig(kind="local", precision="bf16"), model,
        OptimConfig(lr=LR, clip=1.0, ema=[EMA]), World(0, 1, 0, job.device), 1, job.batch,
    )  # fmt: skip

    def step(*batch: Tensor) -> Tensor:
        loss = loss_of(strategy, *batch)
        strategy.backward(loss)
        strategy.step(LR)
        return loss.detach()

    return step


def torch_step(job: Job, compiled: bool) -> Callable[..., Tensor]:
    model = job.model()
    forward = torch.compile(model) if compiled else model
    parameters = list(model.parameters())
    averages = [p.detach().clone() for p in parameters]
    fused = job.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=fused)

    def step(*batch: Tensor) -> Tensor:
        with torch.autocast(job.device.type, torch.bfloat16):
            loss = loss_of(forward, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - EMA)
        return loss.detach()

    return step


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def stepping(job: Job, provider: str) -> Iterator[Callable[..., Tensor]]:
    """One provider's training step; inside the context its operators are in force."""
    torch._dynamo.reset()
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    compiled = provider.endswith(("compile", "compiled"))
    if provider.startswith("etude"):
        yield etude_step(job, compiled)
    else:
        with kernels.use_backend("reference"), kernels.use_backend("sdpa", op="attention"):
            yield torch_step(job, compiled)


def measure(job: Job, provider: str) -> tuple[list[float], dict]:
    """Losses of every step, and the row's own fields."""
    with stepping(job, provider) as step:
        source = job.data()
        data = [next(source) for _ in range(SETS)]
        begun = time.perf_counter()
        losses = [step(*data[i % SETS]) for i in range(WARM_UP)]
        synchronise(job.device)
        first, seconds = time.perf_counter() - begun, []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            losses += [step(*data[i % SETS]) for i in range(job.steps)]
            synchronise(job.device)
            seconds.append((time.perf_counter() - begun) / job.steps)
        shares = breakdown(lambda: [step(*data[i]) for i in range(2)], job.device)
    row = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    row |= {"images_s": job.batch / row["median_s"], "first_steps_s": first, "shares": shares}
    cuda = job.device.type == "cuda"
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    row["kernels"] = kernels.announce(job.device.type) if provider.startswith("etude") else "torch"
    return [float(loss) for loss in losses], row


def breakdown(steps: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of each kind of kernel in the device's time (CPU: in operators' own time)."""
    cuda = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        steps()
        synchronise(device)
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.lower()
        found = (k for k, words in KINDS.items() if any(word in name for word in words))
        times[next(found, "other")] += own
    return {k: round(t / max(1, times.total()), 4) for k, t in times.most_common()}


def curves(job: Job, providers: list[str], count: int) -> list[dict]:
    """Losses of `count` steps per provider, and the largest difference between every two."""
    found: dict[str, list[float]] = {}
    for provider in providers:
        with stepping(job, provider) as step:
            source = job.data()
            losses = torch.stack([step(*next(source)) for _ in range(count)])
        found[provider] = losses.double().tolist()
    rows = []
    for provider, losses in found.items():
        pairs = ((o, zip(losses, others, strict=True)) for o, others in found.items())
        apart = {o: max(abs(a - b) for a, b in pair) for o, pair in pairs if o != provider}
        rows.append({"provider": provider, "losses": losses, "largest_difference": apart})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="DiT-B/2", choices=sorted(MODELS))
    parser.add_argument("--steps", type=int, default=20, help="steps of each of the three blocks")
    parser.add_argument("--batch", type=int, default=0, help="pictures per step [the model's own]")
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS)
    parser.add_argument("--curve", type=int, default=0, help="write the losses of so many steps")
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.batch < 0:
        parser.error("--steps must be at least 1, --batch at least 1 (or 0 for the model's own)")
    job = Job(
        given.model, torch.device(given.device), given.steps, given.batch or MODELS[given.model][1]
    )
    common = results.machine() | {"op": "train_step", "model": job.name, "batch": job.batch}
    common |= {"dtype": "bfloat16", "device": given.device, "steps": job.steps}
    sources = (p for f in ("kernels", "engine/models") for p in sorted((ROOT / f).rglob("*.py")))
    common["source_hash"] = hash_of(*sources)
    if given.curve:
        rows = curves(job, list(given.providers), given.curve)
        results.append(f"curves_{given.device}", [common | row for row in rows])
        for row in rows:
            print(row["provider"], row["losses"][-1], row["largest_difference"])
        return 0
    wanted: list[float] | None = None
    failed = 0
    for provider in given.providers:
        try:
            losses, row = measure(job, provider)
        except Exception as error:  # the other providers are still worth their numbers
            print(f"{provider}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            failed += 1
            continue
        wanted = wanted or losses
        row["loss_drift"] = max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True))
        if not row["loss_drift"] < LARGEST_DRIFT:
            row, failed = {"loss_drift": row["loss_drift"], "refused": "other losses"}, failed + 1
        results.append(f"end_to_end_{given.device}", [common | {"provider": provider} | row])
        print(provider, row, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
