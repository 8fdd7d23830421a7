"""One arm's state and files: what is saved, resumed and reported; called by rounds.py.

An arm is one learner's training. Its folder holds `checkpoints/` (the newest few), `triggers/` (the
state at every round, from which a run can branch), `rounds/` and, at the end, `result.json` and
`correct.npz`. The state of the learner's stream is one integer, `step`; the rest follows from it.
"""

import io
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from etude.core.checkpoint import (
    CheckpointConfig,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from etude.core.files import read_json, write_bytes_atomic, write_json_atomic

from .learner import Learner
from .pictures import Stored
from .scores import correctness
from .trigger import Plateau


@dataclass
class State:
    """Everything beside the tensors that an arm needs to go on.

    Attributes:
        step: optimizer steps done.
        plateau: the trigger's counts.
        added_at: the step at which each round was added.
        looks: (step, monitor accuracy) of every look.
        seconds: time spent learning and looking, drawing left out.
    """

    step: int = 0
    plateau: Plateau = field(default_factory=Plateau)
    added_at: list[int] = field(default_factory=list)
    looks: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, data: dict) -> "State":
        """What `asdict` wrote into a checkpoint."""
        return cls(**{**data, "plateau": Plateau(**data["plateau"])})


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
        found = [path for path in found if path is not None]
        if not found:
            return False
        extra = load_checkpoint(max(found, key=lambda path: path.name), self.learner.strategy)
        self.state = State.from_dict(extra["state"])
        self._saved_at = self.state.step
        self.restart_clock()
        return True

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
        if not trigger:
            prune_checkpoints(folder, CheckpointConfig(keep_last=2))
        self._saved_at = self.state.step

    def save_if_due(self) -> None:
        """Save at whole multiples of the interval."""
        if self.state.step % self._every == 0:
            self.save()

    def look(self, monitor: Stored, weights: str) -> float:
        """Accuracy on the monitor split now, noted in the state."""
        self.learner.refuse_nonfinite(self.state.step)
        accuracy = float(correctness(self.learner.frozen(weights), monitor).mean())
        self.state.looks.append([self.state.step, accuracy])
        return accuracy

    def restart_clock(self) -> None:
        """Leave the time since the last count out of the state's seconds."""
        self._clock = time.monotonic()

    def count_seconds(self) -> None:
        """Add the time since the last count to the state's seconds."""
        now = time.monotonic()
        self.state.seconds += now - self._clock
        self._clock = now

    def finished(self) -> tuple[dict, np.ndarray] | None:
        """Result and correctness (test pictures,) bool of an arm that ended, or None."""
        if not (self.folder / "result.json").exists():
            return None
        with np.load(self.folder / "correct.npz") as stored:
            return read_json(self.folder / "result.json"), stored["correct"]

    def finish(self, result: dict, correct: np.ndarray) -> None:
        """Write the correctness vector, then the result, which says that the arm ended."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, correct=correct)
        write_bytes_atomic(self.folder / "correct.npz", buffer.getvalue())
        write_json_atomic(self.folder / "result.json", result)
