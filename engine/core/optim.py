"""AdamW whose state carries exponential moving averages (EMA) of the weights; used by strategies.

AdamW is Loshchilov and Hutter 2019 (decoupled weight decay). Each EMA profile is one more float32
state beside the two moments, `ema <- d ema + (1 - d) weight` after the weight's own update, so it
is sharded, offloaded and saved exactly as the moments are. The decay warms up,
d = min(decay, (1 + step) / (10 + step)), which keeps an early average meaningful.
`AdamWEMA` works alone in any loop (plain torch, FSDP2, accelerate); strategies add clipping and the
guard against non-finite gradients through `grad_scale` and `found_inf`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from etude.kernels.optimizer import adamw_ema

from .config import Config, option
from .errors import UserError


class OptimConfig(Config):
    """How the weights are updated."""

    lr: float = option(1e-4, "peak learning rate", gt=0)
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments")
    eps: float = option(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = option(0.0, "decoupled decay of matrices (not of vectors)", ge=0)
    clip: float = option(0.0, "largest global gradient norm; 0 turns clipping off", ge=0)
    warmup_images: int = option(0, "linear warm-up of the learning rate", unit="images", ge=0)
    schedule: Literal["constant", "cosine", "wsd"] = option(
        "constant", "after warm-up: constant, cosine to the end, or constant then linear decay"
    )
    decay_fraction: float = option(0.2, "share of the run that `wsd` decays over", gt=0, le=1)
    final_fraction: float = option(0.0, "learning rate at the end over the peak", ge=0, le=1)
    ema: list[float] = option([0.999], "decays of the weight averages, one profile each")

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas must lie in [0, 1)")
        return value

    @field_validator("ema")
    @classmethod
    def _decays_in_range(cls, value: list[float]) -> list[float]:
        if not all(0 < decay < 1 for decay in value) or len(set(value)) != len(value):
            raise ValueError("EMA decays must be distinct and lie strictly between 0 and 1")
        return value

    @property
    def profiles(self) -> list[str]:
        """Names of the weights that can be asked for: "raw" and one "ema:<decay>" per decay."""
        return ["raw", *(profile_name(decay) for decay in self.ema)]


def profile_name(decay: float) -> str:
    """The name of an EMA profile, for example "ema:0.9999"."""
    return f"ema:{decay:.12g}"


def profile_state(profile: str, decays: Sequence[float]) -> str:
    """The state that holds a profile: "weight" for "raw", "ema<i>" for the i-th decay.

    Raises:
        UserError: the profile is not among "raw" and the EMA decays.
    """
    names = {"raw": "weight"} | {profile_name(d): f"ema{i}" for i, d in enumerate(decays)}
    if profile not in names:
        raise UserError(f"there are no weights named {profile!r} here; choose {', '.join(names)}")
    return names[profile]


def learning_rate(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """The learning rate of the step that starts at `images_seen` of `total_images`.

    Warm-up is linear from lr / warmup_images-th of the way; it never returns 0 at the first step.
    """
    if images_seen < config.warmup_images:
        return config.lr * (images_seen + 1) / (config.warmup_images + 1)
    floor = config.final_fraction
    if config.schedule == "cosine":
        span = max(total_images - config.warmup_images, 1)
        done = min((images_seen - config.warmup_images) / span, 1.0)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    if config.schedule == "wsd":
        left = max(total_images - images_seen, 0) / max(config.decay_fraction * total_images, 1.0)
        return config.lr * (floor + (1 - floor) * min(left, 1.0))
    return config.lr


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, "decay" and "no_decay", in the model's own order.

    Vectors (biases, norms) and embedding tables are not decayed. An empty group is left out; the
    first group takes the optimizer's own weight decay.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith("bias") or id(parameter) in tables
            (no_decay if plain else decay).append(parameter)
    groups = [{"params": decay, "name": "decay"}]
    groups.append({"params": no_decay, "name": "no_decay", "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


class AdamWEMA(torch.optim.Optimizer):
    """AdamW with float32 moments and any number of EMA profiles per parameter.

    State of each parameter: `step` (0-d float32 count of its updates), `exp_avg`, `exp_avg_sq`,
    and `ema0`, `ema1`, ... that start as copies of the parameter. Parameters are float32.

    Attributes:
        found_inf: 0-d float32 tensor or None; when it is not 0 the next steps change nothing.
        grad_scale: 0-d float32 tensor or None; gradients are multiplied by it.
        copies: parameter -> bfloat16 or float16 tensor of its shape that receives the new weights
            in the same pass; empty unless the caller fills it.

    Args:
        params: parameters or groups of them, as for any torch optimizer.
        ema_decays: one EMA profile per decay, each in (0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decays: Sequence[float] = (),
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self.ema_decays = [float(decay) for decay in ema_decays]
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.copies: dict[nn.Parameter, Tensor] = {}
        self._lots: dict[Tensor, int] = {}
        self._calls = 0
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep what torch's optimizers do not know of."""
        own = ("ema_decays", "found_inf", "grad_scale", "copies", "_calls")
        return super().__getstate__() | {name: getattr(self, name) for name in own} | {"_lots": {}}

    @classmethod
    def from_config(cls, params: Iterable[Any], config: OptimConfig) -> "AdamWEMA":
        """The optimizer that a recipe's `optim` section describes."""
        return cls(params, config.lr, config.betas, config.eps, config.weight_decay, config.ema)

    @property
    def state_names(self) -> list[str]:
        """Names of the states with the parameter's shape."""
        return ["exp_avg", "exp_avg_sq", *(f"ema{i}" for i in range(len(self.ema_decays)))]

    @torch.no_grad()
    def initialize(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Make all state now (by default it is made at a parameter's first step).

        Args:
            parameters: the tensors to make state for; all parameters of the groups when None.
        """
        if parameters is None:
            parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            self._state_of(parameter)

    def ema_state(self, profile: int = 0) -> dict[nn.Parameter, Tensor]:
        """The weight averages of one profile: parameter -> float32 tensor of its shape."""
        return {
            parameter: self._state_of(parameter)[f"ema{profile}"]
            for group in self.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._calls += 1
        for group in self.param_groups:
            for lot in self._equal_steps([p for p in group["params"] if p.grad is not None]):
                for copied in (True, False):
                    members = [p for p in lot if (p in self.copies) is copied]
                    if members:
                        self._update(group, members)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any torch optimizer."""
        super().load_state_dict(state_dict)
        self.steps_changed()

    def steps_changed(self) -> None:
        """To be called after step counts were written from outside."""
        self._lots = {}

    def _equal_steps(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Lots of parameters whose step counts are equal, found without reading the counts.

        Parameters that took part in the same calls have the same count, whatever was skipped on
        the device; only after loading are the counts read once.
        """
        lots: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter not in self._lots:
                self._lots[parameter] = hash(float(self._state_of(parameter)["step"]))
            lots.setdefault(self._lots[parameter], []).append(parameter)
        for lot, members in lots.items():
            self._lots.update(dict.fromkeys(members, hash((lot, self._calls))))
        return list(lots.values())

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        states = [self._state_of(p) for p in parameters]
        lists = {key: [_local(s[key]) for s in states] for key in self.state_names}
        step = states[0]["step"].double()  # 1 - 0.9999 in float32 would be off by 1e-4 of itself
        warm = (1 + step) / (10 + step)
        copied = parameters[0] in self.copies
        adamw_ema(
            [_local(p) for p in parameters],
            [_local(p.grad) for p in parameters],
            lists["exp_avg"],
            lists["exp_avg_sq"],
            [lists[f"ema{i}"] for i in range(len(self.ema_decays))],
            [s["step"] for s in states],
            [_local(self.copies[p]) for p in parameters] if copied else None,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decays=[torch.clamp(warm, max=decay) for decay in self.ema_decays],
            grad_scale=self._beside(self.grad_scale, parameters[0]),
            found_inf=self._beside(self.found_inf, parameters[0]),
        )

    @staticmethod
    def _beside(value: Tensor | None, parameter: Tensor) -> Tensor | None:
        return None if value is None else value.to(parameter.device, torch.float32)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"AdamWEMA keeps float32 averages of float32 weights but was given a "
                    f"{parameter.dtype} parameter; use autocast, or pass float32 copies"
                )
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in self.state_names:
                average = name.startswith("ema")
                state[name] = parameter.detach().clone() if average else torch.zeros_like(parameter)
        elif state["step"].device != parameter.device:  # torch's load_state_dict leaves it behind
            state["step"] = state["step"].to(parameter.device)
        return state


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (FSDP2) that lies on this rank; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
