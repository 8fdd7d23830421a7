"""One arm's state and files: what is saved, resumed and reported; called by course.py.

An arm is one learner's training. Its folder holds `checkpoints/` (the newest few), `triggers/` (the
state at every round, from which a run can branch), `rounds/` and, at the end, `result.json` and
`correct.npz`. The state of the learner's stream is one integer, `step`; the rest follows from it.
"""

import io
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from etude.core.checkpoint import (
    CheckpointConfig,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from etude.core.distributed import World
from etude.core.files import read_json, write_bytes_atomic, write_json_atomic

from .learner import Learner
from .pictures import Pictures, chunks, right, to_model
from .trigger import Plateau

_LOOKED_AT = 500  # pictures of a test set in one forward pass


@dataclass(frozen=True)
class Pending:
    """A round that was asked for and is not in the pool yet.

    Attributes:
        round: its number; 0 is the start set.
        visible_at: the step from which its pictures are drawn.
        learner: name of the frozen learner that guides them, "" for none.
    """

    round: int
    visible_at: int
    learner: str = ""


@dataclass
class State:
    """Everything beside the tensors that an arm needs to go on.

    Attributes:
        step: optimizer steps done.
        plateau: the trigger's counts.
        pending: the round that is being drawn.
        added_at: the step at which each round was asked for.
        cooldown_at: the step at which the cool-down began early.
        looks: (step, monitor accuracy, pictures in the pool) of every look.
        seconds: time spent learning and looking, drawing left out.
    """

    step: int = 0
    plateau: Plateau = field(default_factory=Plateau)
    pending: Pending | None = None
    added_at: list[int] = field(default_factory=list)
    cooldown_at: int | None = None
    looks: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, data: dict) -> "State":
        """What `asdict` wrote into a checkpoint."""
        pending = Pending(**data["pending"]) if data["pending"] else None
        return cls(**data | {"plateau": Plateau(**data["plateau"]), "pending": pending})


class Arm:
    """A learner, its state and its folder."""

    def __init__(self, name: str, folder: Path, learner: Learner, save_every_steps: int) -> None:
        self.name, self.folder, self.learner = name, folder, learner
        self.state = State()
        self._every = save_every_steps
        self._saved_at = -1
        self._clock = time.monotonic()

    def resume(self) -> bool:
        """Load the newest complete checkpoint, if there is one."""
        found = [latest_checkpoint(self.folder / kind) for kind in ("checkpoints", "triggers")]
        # Of one step, the trigger's was saved later: its round was asked for.
        found = [(path.name, place, path) for place, path in enumerate(found) if path is not None]
        if not found:
            return False
        self.load(max(found)[2])
        self._saved_at = self.state.step
        return True

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of this arm or another."""
        extra = load_checkpoint(checkpoint, self.learner.strategy)
        self.state = State.from_dict(extra["state"])
        self.restart_clock()

    def save(self, *, trigger: bool = False) -> None:
        """Save now; a trigger's state is kept for good, others make room for newer ones."""
        if self._saved_at == self.state.step and not trigger:
            return
        self.count_seconds()
        folder = self.folder / ("triggers" if trigger else "checkpoints")
        images_seen = self.state.step * self.learner.config.batch
        extra = {"state": asdict(self.state)}
        strategy, world = self.learner.strategy, self.learner.world
        save_checkpoint(folder, images_seen, strategy, extra, world)
        if not trigger and world.rank == 0:
            prune_checkpoints(folder, CheckpointConfig(keep_last=2))
        self._saved_at = self.state.step

    def save_if_due(self) -> None:
        """Save at whole multiples of the interval."""
        if self.state.step % self._every == 0:
            self.save()

    def look(self, monitor: Pictures, weights: str, samples: int) -> float:
        """Accuracy on the monitor split now, noted in the state beside the size of the pool."""
        self.learner.refuse_nonfinite(self.state.step)
        frozen, world = self.learner.frozen(weights), self.learner.world
        accuracy = float(correct_of_all(frozen, monitor, world).mean())
        self.state.looks.append([self.state.step, accuracy, samples])
        return accuracy

    def restart_clock(self) -> None:
        """Leave the time since the last count out of the state's seconds."""
        self._clock = time.monotonic()

    def count_seconds(self) -> None:
        """Add the time since the last count to the state's seconds."""
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now

    def finished(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """Result and correctness by test set, each (pictures,) bool, of an arm that ended."""
        if not (self.folder / "result.json").exists():
            return None
        with np.load(self.folder / "correct.npz") as stored:
            return read_json(self.folder / "result.json"), dict(stored)

    def finish(self, result: dict, correct: dict[str, np.ndarray]) -> None:
        """Write the correctness vectors, then the result, which says that the arm ended."""
        if self.learner.world.rank != 0:
            return
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **correct)
        write_bytes_atomic(self.folder / "correct.npz", buffer.getvalue())
        write_json_atomic(self.folder / "result.json", result)


@torch.no_grad()
def correct_of_all(model: nn.Module, split: Pictures, world: World) -> np.ndarray:
    """Which pictures of a split the model labels rightly, (n,) bool, each rank taking a share."""
    count = len(split)
    first, end = count * world.rank // world.size, count * (world.rank + 1) // world.size
    found = torch.zeros(count, dtype=torch.int32, device=world.device)
    for rows in chunks(np.arange(first, end), _LOOKED_AT):
        logits = model(to_model(split.images(rows), world.device)).float()
        found[int(rows[0]) : int(rows[-1]) + 1] = right(logits, split, rows).int()
    if world.size > 1:
        dist.all_reduce(found, group=world.group)
    return found.cpu().numpy().astype(bool)
