"""One step of `adamw_ema` on hard numbers, for test_optimizer.py and interpret_optimizer.py."""

import itertools

import torch
from torch import Tensor

from etude import kernels

STEPS = (0.0, 999_999.0)
RATES = (1e-5, 1e-3, 1e-1)
DECAYS = (0.9, 0.9999)
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def hard(count: int, seed: int) -> dict[str, Tensor]:
    """Magnitudes over twelve decades; in a third of the first moment's sums the terms cancel."""
    g = torch.Generator().manual_seed(seed)

    def wide(low: float, high: float) -> Tensor:
        size = 10 ** (torch.rand(count, generator=g, dtype=torch.float64) * (high - low) + low)
        return size * torch.randint(0, 2, (count,), generator=g).mul(2).sub(1)

    made = {name: wide(-9, 3).float() for name in ("param", "grad", "exp_avg", "ema0", "ema1")}
    third = count // 3
    # down to a millionth: below, the float64 result to compare with loses its own last places
    off = 1 + 10 ** (torch.rand(third, generator=g, dtype=torch.float64) * 5 - 6)
    made["exp_avg"][:third] = (made["grad"][:third].double() * -0.1 / 0.9 * off).float()
    made["exp_avg_sq"] = wide(-18, 6).abs().float()
    made["exp_avg_sq"][third : third + 5] = 0.0
    return made


def by_float64(
    data: dict[str, Tensor], step: float, lr: float, scale: float, stored: Tensor
) -> dict[str, Tensor]:
    """The equations as they are written, in float64; the averages from the weight as stored."""
    (beta1, beta2), eps = SETTINGS["betas"], SETTINGS["eps"]
    wide, t = {k: v.double() for k, v in data.items()}, step + 1
    g = wide["grad"] * scale
    m = beta1 * wide["exp_avg"] + (1 - beta1) * g
    v = beta2 * wide["exp_avg_sq"] + (1 - beta2) * g * g
    bottom = v.sqrt() / (1 - beta2**t) ** 0.5 + eps
    p = wide["param"] * (1 - lr * SETTINGS["weight_decay"]) - lr / (1 - beta1**t) * m / bottom
    made = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    for k, decay in enumerate(DECAYS):
        made[f"ema{k}"] = decay * wide[f"ema{k}"] + (1 - decay) * stored.double()
    return made


def units(got: Tensor, want: Tensor) -> float:
    """Largest error in units in the last place of the float32 number at `want`."""
    size = want.abs().float()
    last = torch.nextafter(size, torch.tensor(torch.inf)) - size
    return float(((got.double() - want).abs() / last.double()).max())


def errors(count: int) -> dict[str, float]:
    """Largest error of each state over all steps and rates, in units in the last place."""
    worst: dict[str, float] = {}
    for seed, (step, lr) in enumerate(itertools.product(STEPS, RATES)):
        scale = (1.0, 0.37)[seed % 2]
        data = hard(count, seed)
        made = {name: t.clone() for name, t in data.items()}
        kernels.adamw_ema(
            [made["param"]], [made["grad"]], [made["exp_avg"]], [made["exp_avg_sq"]],
            [[made["ema0"]], [made["ema1"]]], [torch.tensor(step)],
            lr=lr, ema_decays=DECAYS, grad_scale=None if scale == 1.0 else scale, **SETTINGS,
        )  # fmt: skip
        want = by_float64(data, step, lr, scale, made["param"])
        for name, value in want.items():
            worst[name] = max(worst.get(name, 0.0), units(made[name], value))
    return worst
