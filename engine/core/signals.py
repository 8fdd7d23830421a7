"""Stopping in good order: signals, time limits and dead parents become a flag that loops poll.

Used by every long phase (training, practice, sampling, encoding, extraction) as

    with Stopper(max_minutes=recipe.max_minutes) as stopper:
        for batch in batches:
            ...
            if stopper.requested:
                save and leave with EXIT_REQUEUE

Handlers exist only inside the context, so Etude changes no process that uses it as a library.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import UserError


class StopRequested(Exception):
    """Raised by `Stopper.check`; its text is the reason. What was written before it stays."""


EXIT_REQUEUE = 85  # the job saved and wants to be started again; Slurm scripts requeue on it
_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


class Stopper:
    """Collects requests to stop while its context is open.

    Args:
        max_minutes: request a stop this long after the context opened; None for no limit.
        watch_parent: request a stop when the process that started this one is gone (deepspeed's
            launcher leaves its ranks running when it is killed).

    A first Ctrl-C requests a stop, a second raises KeyboardInterrupt. Outside the main thread no
    handlers are installed; time limit and parent are still watched.
    """

    def __init__(self, *, max_minutes: float | None = None, watch_parent: bool = False) -> None:
        if max_minutes is not None and not max_minutes > 0:
            raise UserError(f"max_minutes is {max_minutes}; give a number above 0, or null")
        self._max_minutes = max_minutes
        self._deadline: float | None = None
        self._launcher = _launcher() if watch_parent else None
        self._reason: str | None = None
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stopper":
        if self._max_minutes is not None and self._deadline is None:
            self._deadline = time.monotonic() + 60.0 * self._max_minutes
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @property
    def requested(self) -> str | None:
        """Why to stop ("SIGTERM", "Ctrl-C", "max_minutes=30", ...), or None to go on."""
        if self._reason is None:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._reason = f"max_minutes={self._max_minutes:g}"
            elif self._launcher is not None and _launcher() != self._launcher:
                self._reason = "the launcher is gone"
        return self._reason

    def check(self) -> None:
        """Raise `StopRequested` when a stop was asked for: for phases whose work is resumable at
        any point, such as encoding, drawing or extracting."""
        if self.requested:
            raise StopRequested(self.requested)

    def request(self, reason: str) -> None:
        """Request a stop from code, for example because another rank was asked to."""
        self._reason = self._reason or reason

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self.request("Ctrl-C")
            if sys.stderr is not None and sys.stderr.isatty():
                with contextlib.suppress(OSError):  # print() is not safe inside a handler
                    os.write(2, b"\nsaving, then stopping; Ctrl-C again stops at once\n")
            return
        self.request(signal.Signals(number).name)


def _launcher() -> tuple[int, int]:
    """The parent, and under deepspeed its parent as well: `deepspeed` starts its ranks through a
    process of its own on each machine, which goes on alone when the first is killed.
    """
    parent = os.getppid()
    above = _parent(parent) if b"deepspeed" in _command(parent) else 0
    return parent, above if b"deepspeed" in _command(above) else 0


def _parent(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
