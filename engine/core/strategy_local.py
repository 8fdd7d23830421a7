"""Plain torch: whole state on every rank, gradients averaged in a fixed order.

Chosen by `strategy.kind: local`; also the yardstick that the ZeRO strategy is tested against. With
bf16 the module is bf16, gradients accumulate in float32 and float32 masters are updated.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import World
from .optim import AdamWEMA, OptimConfig, param_groups
from .strategy import (
    Fragment,
    StrategyBase,
    StrategyConfig,
    buckets,
    even_share,
    optimizer_views,
    persistent_buffers,
)


class LocalStrategy(StrategyBase):
    """See `strategy.Strategy`."""

    def __init__(
        self,
        config: StrategyConfig,
        model: nn.Module,
        optim: OptimConfig,
        world: World,
        accumulation: int = 1,
    ) -> None:
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.module = model.to(world.device, torch.float32)
        if world.size > 1:
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.data, 0, group=world.group)
        self._masters = self._split(model)
        super().__init__(model, optim, world, accumulation)
        self.optimizer = AdamWEMA.from_config(self._groups, optim)
        self.optimizer.initialize()
        if self.dtype != torch.float32:  # the optimizer's pass writes the module's weights too
            self.optimizer.copies = {self._masters[n]: p.detach() for n, p in self._trainable()}
        self._sums: dict[str, Tensor] = {}

    def _split(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Float32 masters by name: the parameters themselves, or copies when the module is bf16."""
        self._groups = param_groups(model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.dtype == torch.float32:
            return named
        copies = {id(p): nn.Parameter(p.detach().clone()) for p in named.values()}
        for group in self._groups:
            group["params"] = [copies[id(p)] for p in group["params"]]
        masters = {name: copies[id(p)] for name, p in named.items()}
        model.to(self.dtype)
        return masters

    @property
    def compute_dtype(self) -> torch.dtype:
        """See `StrategyBase`."""
        return self.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the model."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        self._loss_bad = self._loss_bad | ~torch.isfinite(loss.detach())
        (loss / self.accumulation).backward()
        if self.dtype != torch.float32:
            for name, parameter in self._trainable():
                if parameter.grad is not None:
                    grad = parameter.grad.float()
                    self._sums[name] = self._sums[name].add_(grad) if name in self._sums else grad
                    parameter.grad = None

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """See `Strategy.step`."""
        grads = self._gradients()
        bad = self._loss_bad
        if self.world.size > 1:
            bad = self._average(grads)
        self.grad_norm = torch.linalg.vector_norm(
            torch.stack(torch._foreach_norm(list(grads.values())))
        )
        self.nonfinite = bad | ~torch.isfinite(self.grad_norm)
        self.optimizer.found_inf = self.nonfinite.float()
        if self.optim.clip > 0:
            self.optimizer.grad_scale = torch.clamp(
                self.optim.clip / (self.grad_norm + 1e-6), max=1.0
            )
        for name, master in self._masters.items():
            master.grad = grads[name]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sums = {}
        self._loss_bad = torch.zeros_like(self._loss_bad)

    def has_nonfinite(self) -> Tensor:
        """0-d bool device tensor: the losses or gradients of this step so far, on this rank."""
        norms = torch._foreach_norm(list(self._gradients().values()))
        return self._loss_bad | ~torch.isfinite(torch.stack(norms)).all()

    def _gradients(self) -> dict[str, Tensor]:
        """Float32 gradients by name; a parameter that took no part has zeros, as under ZeRO."""
        if self.dtype != torch.float32:
            found = self._sums
        else:
            found = {n: p.grad for n, p in self._trainable() if p.grad is not None}
        return {
            name: found[name] if name in found else torch.zeros_like(master)
            for name, master in self._masters.items()
        }

    def _average(self, grads: dict[str, Tensor]) -> Tensor:
        """Average gradients over ranks in place; returns whether any rank saw a bad loss."""
        flags = self._loss_bad.float().reshape(1)
        dist.all_reduce(flags, group=self.world.group)
        for names in buckets(list(grads), self.shapes):
            flat = torch.cat([grads[name].reshape(-1) for name in names])
            dist.all_reduce(flat, group=self.world.group)
            flat /= self.world.size
            sizes = [grads[name].numel() for name in names]
            for name, part in zip(names, flat.split(sizes), strict=True):
                grads[name].copy_(part.view_as(grads[name]))
        return flags[0] > 0

    @torch.no_grad()
    def refresh(self) -> None:
        """See `StrategyBase`."""
        if self.dtype != torch.float32:
            for name, parameter in self._trainable():
                parameter.copy_(self._masters[name])

    def views(self) -> Iterator[Fragment]:
        """See `StrategyBase`."""
        for name, master in self._masters.items():
            yield from optimizer_views(name, self.shapes[name], self.optimizer, master)
        for name, tensor in self._others().items():
            yield Fragment(name, "weight", 0, tensor.detach().view(-1), tuple(tensor.shape))

    def fragments(self) -> Iterator[Fragment]:
        """See `Strategy.fragments`; every rank holds all, so each saves an even share."""
        for view in self.views():
            share = even_share(view, self.world.rank, self.world.size)
            if share is not None:
                yield share

    def _others(self) -> dict[str, Tensor]:
        frozen = {n: p.data for n, p in self.module.named_parameters() if not p.requires_grad}
        return frozen | persistent_buffers(self.module)
