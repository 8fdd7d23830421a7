"""One rank of some: `learners.py FILE`; rank 0 writes what learners of every kind did there.

Each learner takes five steps; noted are the global batch's mean loss of each, and the sums of its
raw and averaged weights and buffers by name, on every rank.
"""

import sys

import numpy as np
import torch

from etude.core import distributed
from etude.core.distributed import World
from etude.core.strategy import StrategyConfig
from etude.practice.learner import Learner, LearnerConfig

STEPS, BATCH, SIZE = 5, 8, 16
RECIPE = dict(batch=BATCH, lr=2e-3, ema=0.6, flip=True)
STRONG = RECIPE | dict(
    shift=0,
    crop_scale=(0.3, 1.0),
    randaugment={"num_ops": 2, "magnitude": 9},
    mixup=0.5,
    cutmix=1.0,
    erase=0.3,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.2, 0.3),
)
SMALL = dict(in_channels=3, num_classes=4, channels=(8, 16), groups=4)
RESNET = dict(family="resnet", num_classes=4, width=8, stem="small")
VIT = dict(
    family="vit", num_classes=4, input_size=16, patch_size=4, hidden_size=24, depth=2, num_heads=3
)
LEARNERS = {
    "small": RECIPE | {"model": SMALL},
    "small strong": STRONG | {"model": SMALL},
    "vit strong": STRONG | {"model": VIT},
    "resnet batch": STRONG | {"model": RESNET},
    "resnet group": STRONG | {"model": RESNET | {"norm": "group", "groups": 4}},
}


def fetch(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A pool's answer: pictures of noise whose brightness says the class."""
    images = np.stack([
        np.random.default_rng(int(p)).integers(0, 120, (SIZE, SIZE, 3), np.uint8)
        for p in positions
    ])  # fmt: skip
    labels = positions % 4
    return images + (40 * labels[:, None, None, None]).astype(np.uint8), labels


def run(name: str, strategy: str, world: World, precision: str = "fp32") -> dict:
    kind, stage = strategy.split()
    stage = None if stage == "None" else int(stage)
    config = StrategyConfig(kind=kind, stage=stage, precision=precision)
    learner = Learner(LearnerConfig(**LEARNERS[name]), 3, world, config)
    losses = []
    for step in range(STEPS):
        loss = learner.step(fetch, step, 1.0 - 0.1 * step)
        parts = distributed.exchange(world, "loss", float(loss))
        losses.append(sum(parts) / len(parts))
    learner.refuse_nonfinite(STEPS)
    found = {}
    for weights in ("raw", "ema"):
        frozen = learner.frozen(weights)
        tensors = {n: float(t.double().sum()) for n, t in frozen.network.state_dict().items()}
        with torch.no_grad():
            logits = frozen(torch.linspace(-1, 1, 3 * 20 * 20).view(1, 3, 20, 20))
        found[weights] = tensors | {"logits": float(logits.square().sum())}
    wide = all(t.dtype != torch.bfloat16 for t in frozen.network.state_dict().values())
    return {"losses": losses, "wide": wide, "ranks": distributed.exchange(world, "found", found)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = distributed.start()
    jobs = [(name, "local None") for name in LEARNERS]
    if here.size > 1:
        jobs += [("vit strong", "zero 3"), ("resnet batch", "zero 1")]
    report = {f"{name} {strategy}": run(name, strategy, here) for name, strategy in jobs}
    for strategy in ("local None", "zero 3"):
        report[f"resnet batch {strategy} bf16"] = run("resnet batch", strategy, here, "bf16")
    if here.rank == 0:
        torch.save(report, sys.argv[1])
    distributed.stop(here)
