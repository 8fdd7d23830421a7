"""One rank of some: `families.py FILE`; rank 0 writes the losses of every family there.

Three steps of each family, of one rank with plain torch and of two under each strategy, from
weights none of which is zero, with a learned variance's channels, control, dropping and, for
MDTv2, both passes, or (`mdt-unmasked`) the first alone, which leaves its side block without
gradients.
"""

import sys

import torch
from torch import nn

from etude.core import distributed
from etude.core.optim import OptimConfig
from etude.core.strategy import StrategyConfig, build_strategy
from etude.diffusion.objectives import Noise, Objective, ObjectiveConfig
from etude.models.families import FAMILIES, build_denoiser
from etude.models.mdt import keep_indices

STRATEGIES = ("local None", "zero 0", "zero 1", "zero 2", "zero 3")
STEPS, BATCH = 3, 4
OPTIM = OptimConfig(lr=1e-3, clip=1.0, ema=[0.9])
CONTROL = {"control": [{"name": "flip", "exponent": 1}, {"name": "height", "exponent": 4}]}
TEXT = CONTROL | {"semantic": "text", "text_tokens": 5, "text_width": 8, "pooled_width": 6}
SMALL = dict(input_size=8, in_channels=2, depth=2, num_classes=3)
MODELS = {
    "dit": SMALL | dict(hidden_size=32, num_heads=2, conditioning=CONTROL),
    "mdt": SMALL | dict(depth=4, decode_layer=2, hidden_size=32, num_heads=2, conditioning=CONTROL),
    "mdt-unmasked": SMALL
    | dict(depth=4, decode_layer=2, hidden_size=32, num_heads=2, conditioning=CONTROL),
    "mmdit": SMALL | dict(hidden_size=64, qk_norm="rms", conditioning=TEXT),
    "pixart": SMALL
    | dict(hidden_size=32, num_heads=2, conditioning=TEXT | {"pooled_width": 0}),
    "unet": dict(
        input_size=8, in_channels=2, num_classes=3, model_channels=32, channel_mult=(1, 2),
        num_res_blocks=1, attention_downsamplings=(2,), head_channels=16, context_width=16,
        conditioning=CONTROL,
    ),
}  # fmt: skip


def network(name: str) -> nn.Module:
    family = name.partition("-")[0]
    model = build_denoiser(FAMILIES[family][0](family=family, **MODELS[name]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def condition(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What every family needs of one global batch; each reads its own part."""
    return {
        "labels": torch.randint(0, 3, (BATCH,), generator=generator),
        "text": torch.randn(BATCH, 5, 8, generator=generator),
        "text_lengths": torch.randint(1, 6, (BATCH,), generator=generator),
        "pooled": torch.randn(BATCH, 6, generator=generator),
        "control": torch.rand(BATCH, 2, generator=generator) * 9.0,
        "drop_semantic": torch.rand(BATCH, generator=generator) < 0.3,
        "drop_control": torch.rand(BATCH, generator=generator) < 0.3,
    }


def train(world: distributed.World, family: str, name: str) -> list[float]:
    kind, stage = name.split()
    config = StrategyConfig(
        kind=kind, stage=None if kind == "local" else int(stage), precision="fp32"
    )
    micro = BATCH // world.size
    strategy = build_strategy(config, network(family), OPTIM, world, 1, micro)
    objective, losses = Objective(ObjectiveConfig()), []
    part = slice(world.rank * micro, (world.rank + 1) * micro)

    def denoise(x: torch.Tensor, t: torch.Tensor, asked: dict) -> torch.Tensor:
        return strategy(x, t * 1000.0, asked)

    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x0 = torch.randn(BATCH, 2, 8, 8, generator=generator)[part]
        t = torch.rand(BATCH, generator=generator)[part]
        asked = {k: v[part] for k, v in condition(generator).items()}
        where = torch.arange(BATCH)[part] + BATCH * step
        loss = objective.losses(denoise, x0, Noise(where, 0, 8), t, asked).mean()
        if family == "mdt":
            asked["keep"] = keep_indices(torch.rand(BATCH, 16, generator=generator)[part], 0.4)
            loss = loss + objective.losses(denoise, x0, Noise(where, 0, 9), t, asked).mean()
        strategy.backward(loss)
        strategy.step(OPTIM.lr)
        parts = distributed.exchange(world, "loss", loss.item())
        losses.append(sum(parts) / world.size)
    return losses


def main() -> None:
    world = distributed.start()
    if world.size == 1:
        found = {family: train(world, family, "local None") for family in MODELS}
    else:
        pairs = [(family, name) for family in MODELS for name in STRATEGIES]
        found = {f"{family} {name}": train(world, family, name) for family, name in pairs}
    if world.rank == 0:
        torch.save(found, sys.argv[1])
    distributed.stop(world)


if __name__ == "__main__":
    main()
