"""Two models that learn in one step: any strategy, and a plain-torch one beside it.

Called by training where a second network with an optimizer of its own judges the first, as a
discriminator does. The loop sees one strategy: `backward` also takes the second's gradients, `step`
moves the first and then the second, and a checkpoint holds the states of both. Where either meets
a value that is not finite, neither changes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .strategy import Fragment, Reader, Strategy
from .strategy_local import LocalStrategy


class PairStrategy:
    """See `strategy.Strategy`; norms, profiles and full weights are those of the first.

    Args:
        name: the second's names in a checkpoint start with it and a dot.
        second_loss: called after each backward pass of the first; the second's loss of the same
            micro batch, a scalar, or None in a step that the second sits out. It is None on all
            ranks or on none, and in all micro batches of a step or in none.
        lr_ratio: the second's learning rate over the first's.
    """

    def __init__(
        self,
        first: Strategy,
        second: LocalStrategy,
        name: str,
        second_loss: Callable[[], Tensor | None],
        lr_ratio: float = 1.0,
    ) -> None:
        self.first, self.second, self.prefix = first, second, f"{name}."
        self.second_loss, self.lr_ratio = second_loss, lr_ratio
        self.world, self.profiles, self.notes = first.world, first.profiles, first.notes
        self.shapes, self.trainable = first.shapes, first.trainable
        self.profile_states, self.aliases = first.profile_states, first.aliases
        self.nonfinite = first.nonfinite
        self._learns = False

    @property
    def grad_norm(self) -> Tensor:
        """Of the first."""
        return self.first.grad_norm

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the first model."""
        return self.first(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """See `Strategy.backward`."""
        self.first.backward(loss)
        loss = self.second_loss()
        if loss is not None:
            self.second.backward(loss)
            self._learns = True

    def step(self, lr: float) -> None:
        """See `Strategy.step`."""
        if self._learns:
            self.first.refuse(self.second.has_nonfinite())
        self.first.step(lr)
        self.nonfinite = self.first.nonfinite
        if self._learns:
            self.second.refuse(self.first.nonfinite)
            self.second.step(lr * self.lr_ratio)
            self.nonfinite = self.nonfinite | self.second.nonfinite
        self._learns = False

    def weights(
        self, profile: str, dtype: torch.dtype | None = None
    ) -> AbstractContextManager[nn.Module]:
        """See `Strategy.weights`."""
        return self.first.weights(profile, dtype)

    def fragments(self) -> Iterator[Fragment]:
        """See `Strategy.fragments`."""
        yield from self.first.fragments()
        for part in self.second.fragments():
            yield replace(part, name=self.prefix + part.name)

    def load_fragments(self, reader: Reader) -> None:
        """See `Strategy.load_fragments`."""
        self.first.load_fragments(reader)
        self.second.load_fragments(_Prefixed(reader, self.prefix))

    def inventory(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """See `Strategy.inventory`."""
        second = self.second.inventory().items()
        named = {(self.prefix + name, state): shape for (name, state), shape in second}
        return self.first.inventory() | named


class _Prefixed:
    """A reader that looks names up behind a prefix."""

    def __init__(self, reader: Reader, prefix: str) -> None:
        self.reader, self.prefix = reader, prefix

    def read(self, name: str, state: str, start: int, length: int) -> Tensor:
        return self.reader.read(self.prefix + name, state, start, length)
