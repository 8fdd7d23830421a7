"""Where generated pictures come from: one growing pool per arm; called by rounds.py.

A pool is filled in chunks, each appended whole or not at all, so an interrupted round goes on with
its next chunk. Picture i of an arm is fixed by (seed, i, learner): its label is i mod classes and
its noise that of index i. Unguided pictures of the same index are therefore the same in every arm;
they are copied from an arm that has them, and the cost of drawing them is booked in both.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from etude.data.pool import Pool
from etude.diffusion.guidance import GuidanceConfig

from .learner import weights_hash
from .pictures import to_model
from .scores import entropy


class Generator(Protocol):
    """What practice asks of a generator; `etude.sampling.Generator` is one.

    Attributes:
        name, fingerprint: for people, and the identity of its weights.
        classes: names in index order.
        training_shards: folder of the pictures it was trained on; empty when not known.
        evaluations: rows that its denoiser has predicted so far.
        device: where it draws.
    """

    name: str
    fingerprint: str
    classes: list[str]
    training_shards: str
    device: torch.device

    @property
    def evaluations(self) -> int: ...

    def draw(
        self,
        indices: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int,
        learner: nn.Module | None = None,
        guidance: GuidanceConfig | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """uint8 (n, H, W, C) of indices and labels (n,) int64, and telemetry arrays (n,)."""


class Supply:
    """Draws the pictures of all arms of a run.

    Args:
        folder: holds one pool per arm.
        chunk: pictures appended to a pool at a time.
    """

    def __init__(
        self, generator: Generator, guidance: GuidanceConfig, seed: int, chunk: int, folder: Path
    ) -> None:
        self.generator, self.guidance, self.seed, self.chunk = generator, guidance, seed, chunk
        self.folder = folder
        self._unguided: dict[str, tuple[Pool, int]] = {}  # arm -> pool, its leading unguided part

    def pool(self, arm: str) -> Pool:
        """The arm's pool, as far as it is filled."""
        return Pool(self.folder / arm)

    def share(self, arm: str, pool: Pool, unguided: int) -> None:
        """Let later arms copy the first `unguided` pictures of a pool."""
        self._unguided[arm] = (pool, unguided)

    def fill(
        self,
        pool: Pool,
        size: int,
        *,
        visible_from: int,
        round_number: int,
        learner: nn.Module | None,
        stopped: Callable[[], bool],
        advance: Callable[[], None],
    ) -> bool:
        """Append pictures until the pool holds `size`; False when stopped before that.

        Args:
            visible_from: position of the learner's stream from which the round is drawn from.
            learner: guides the new pictures; None draws them unguided.
            advance: called after each chunk.
        """
        name = weights_hash(learner) if learner is not None else ""
        guidance = self.guidance.model_dump(mode="json") if learner is not None else None
        while len(pool) < size:
            if stopped():
                return False
            start = len(pool)
            indices = np.arange(start, min(size, (start // self.chunk + 1) * self.chunk))
            images, entropies, cost = self._make(indices, learner)
            pool.append(
                images,
                self.labels(indices),
                seed_indices=indices,
                entropies=entropies,
                visible_from=visible_from,
                guidance={"round": round_number, "guidance": guidance, **cost},
                generator=self.generator.fingerprint,
                learner=name,
            )
            advance()
        return True

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Classes in turn, (n,) int64, so that every whole round is balanced."""
        return indices % len(self.generator.classes)

    def draw(
        self, indices: np.ndarray, learner: nn.Module | None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Pictures (n, S, S, C) uint8 and what they cost: denoiser evaluations and seconds."""
        began, before = time.perf_counter(), self.generator.evaluations
        images, _ = self.generator.draw(
            indices,
            self.labels(indices),
            seed=self.seed,
            learner=learner,
            guidance=self.guidance if learner is not None else None,
        )
        evaluations = self.generator.evaluations - before
        cost = {"evaluations": evaluations, "seconds": time.perf_counter() - began}
        return images, cost

    def _make(
        self, indices: np.ndarray, learner: nn.Module | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        unknown = np.full(len(indices), np.nan, np.float32)
        if learner is None:
            for pool, unguided in self._unguided.values():
                if indices[-1] < unguided:
                    share = len(indices) / unguided
                    cost = {k: v * share for k, v in cost_of(pool, unguided).items()}
                    return pool.images(indices), unknown, cost
            images, cost = self.draw(indices, None)
            return images, unknown, cost
        images, cost = self.draw(indices, learner)
        with torch.no_grad():
            logits = learner(to_model(images, self.generator.device))
        return images, entropy(logits.float()).cpu().numpy(), cost


def cost_of(pool: Pool, size: int | None = None) -> dict[str, float]:
    """Denoiser evaluations and seconds that drawing the first `size` pictures took.

    One evaluation is one forward of the denoiser for one picture; padding and both halves of
    classifier-free guidance count, the backward pass of guidance shows in the seconds only.
    """
    entries = [e for e in pool.rounds if size is None or e.first + e.count <= size]
    return {
        key: float(sum(entry.guidance[key] for entry in entries))
        for key in ("evaluations", "seconds")
    }
