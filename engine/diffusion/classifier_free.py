"""Classifier-free guidance (Ho and Salimans 2022); called by `samplers.py`.

It contrasts predictions p(semantic, control) of one network under less and less that is asked for,
of which the first alone is the conditional one:

    one weight    p(s, c) + w (p(s, c) - p(0, c))                              two evaluations
    two weights   p(s, c) + w (p(s, c) - p(0, c)) + u (p(0, c) - p(0, 0))      three

which with w = lambda - 1 and u = beta - 1 is p(0, 0) + beta (p(0, c) - p(0, 0)) + lambda (p(s, c) -
p(0, c)).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .objectives import Denoiser


@dataclass(frozen=True)
class Predictor:
    """What classifier-free guidance needs of a network, in one call on a stacked batch.

    Attributes:
        condition: what is asked for, entries of length B.
        stacked: it and those that ask for less, one after another.
    """

    denoiser: Denoiser
    condition: dict[str, Any]
    stacked: dict[str, Any]

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        condition: dict[str, Any],
        nulls: Sequence[dict[str, Any]],
        contrasts: int,
    ) -> "Predictor":
        """Stacks the condition on the first `contrasts` of `nulls`, which ask for ever less."""
        if len(nulls) < contrasts:
            raise ValueError(
                f"classifier-free guidance needs nulls: {contrasts} conditions that ask for less"
                f" and less, not {len(nulls)}"
            )
        stacked = _concatenate(condition, *nulls[:contrasts]) if contrasts else {}
        return cls(denoiser, condition, stacked)

    def __call__(self, x: Tensor, time: Tensor, copies: int) -> Tensor:
        """Raw output at x (B, C, H, W) and a time () in [0, 1].

        Args:
            copies: 1: under the condition alone, (B, ...); else how many conditions are stacked,
                (copies B, ...) in their order.
        """
        t = time.repeat(copies * len(x))
        if copies == 1:
            return self.denoiser(x, t, self.condition)
        return self.denoiser(torch.cat((x,) * copies), t, self.stacked)

    def traced(self, x: Tensor, time: Tensor, copies: int) -> tuple[Tensor, Tensor]:
        """As a call, but the rows under the condition also with their graph back to x.

        They are evaluated on their own, since the others need no graph: as many rows in all.

        Args:
            x: (B, C, H, W), a leaf that requires a gradient.

        Returns:
            Raw output (copies B, ...) without a graph, and its first B rows with theirs.
        """
        others = []
        if copies > 1:
            t = time.repeat((copies - 1) * len(x))
            less = _from_row(self.stacked, len(x))
            with torch.no_grad():
                others.append(self.denoiser(torch.cat((x.detach(),) * (copies - 1)), t, less))
        with torch.enable_grad():
            asked = self.denoiser(x, time.repeat(len(x)), self.condition)
        return torch.cat((asked.detach(), *others)), asked


def power_cosine(time: float, power: float) -> float:
    """Share of a guidance weight at a time: 0 at pure noise, 1 at the end (MDTv2; power 4)."""
    return 0.5 * (1.0 - math.cos(math.pi * (1.0 - time) ** power))


def classifier_free(
    output: Tensor, x: Tensor, *, weights: Tensor, channels: int | None = None
) -> Tensor:
    """The guided prediction of a `Predictor`'s output at x: (B, ...).

    Args:
        weights: (K,), of the differences between neighbours of the stack; 0 leaves one out.
        channels: guide only the first channels of the prediction; the others, and a learned
            variance, are the conditional ones.
    """
    if len(output) == len(x):
        return output
    parts = output.chunk(1 + len(weights))
    count = x.shape[1] if channels is None else min(channels, x.shape[1])
    guided = parts[0][:, :count]
    for weight, more, less in zip(weights, parts[:-1], parts[1:], strict=True):
        # In the weight's dtype: in bfloat16 the weight itself would be rounded.
        step = weight * (more[:, :count] - less[:, :count]).to(weight.dtype)
        guided = guided + step.to(guided.dtype)
    return torch.cat((guided, parts[0][:, count:]), dim=1)


def _concatenate(*parts: Any) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {name: _concatenate(*(part[name] for part in parts)) for name in first}
    return (
        torch.cat(parts) if isinstance(first, Tensor) else [row for part in parts for row in part]
    )


def _from_row(condition: Any, first: int) -> Any:
    """What `_concatenate` made, without its first rows."""
    if isinstance(condition, dict):
        return {name: _from_row(value, first) for name, value in condition.items()}
    return condition[first:]
