"""The lock of a run's folder: one writer at a time, across processes and machines.

`lock.json` names host, process and start; its modification time is the heartbeat, renewed every
five seconds by a daemon thread. A lock is stale when its process is gone (seen from the same host
and process namespace) or when, from elsewhere, its heartbeat is older than a minute. Ages are
differences of modification times given by the file system itself, so clocks need not agree.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .files import write_json_atomic

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class Lock:
    """Holds `folder/lock.json` from construction to `release`.

    Raises:
        UserError: another live process holds it; the message names host and process.
    """

    def __init__(self, folder: Path, *, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self.path = Path(folder) / "lock.json"
        self.token = uuid.uuid4().hex
        self._pid = os.getpid()
        with _guard(self.path.parent):
            holder = read_lock(self.path)
            if holder is not None and not is_stale(self.path, holder):
                raise UserError(
                    f"{self.path.parent} is being written by {_who(holder)}; wait for it, stop "
                    "it, or give another folder with run=NAME"
                )
            write_json_atomic(self.path, {**_identity(), "token": self.token})
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, args=(heartbeat_seconds,), name="run-heartbeat", daemon=True
        )
        self._thread.start()

    @property
    def held(self) -> bool:
        """False when another process took the lock over, for example after a long suspension."""
        holder = read_lock(self.path)
        return holder is not None and holder.get("token") == self.token

    def release(self) -> None:
        """Remove the lock if it is still ours; calling it again, or in a forked child, is fine."""
        if os.getpid() != self._pid:
            return
        self._stop.set()
        self._thread.join()
        if not self.path.parent.is_dir():
            return
        with _guard(self.path.parent):
            if self.held:
                self.path.unlink(missing_ok=True)

    def _beat(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            with contextlib.suppress(OSError):  # a file system that is away for a moment
                if not self.held:
                    return
                os.utime(self.path)


def read_lock(path: Path) -> dict | None:
    """The content of a lock file; None when there is none, {} when it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_stale(path: Path, holder: dict) -> bool:
    """Whether the process that wrote the lock `holder` at `path` is gone."""
    me = _identity()
    if holder.get("host") == me["host"] and holder.get("namespace") == me["namespace"]:
        return _birth(holder.get("pid")) != holder.get("birth") or holder.get("birth") is None
    return heartbeat_age(path) > STALE_SECONDS


def heartbeat_age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system that holds the lock."""
    probe = path.with_name(f".clock.{uuid.uuid4().hex[:8]}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
    except OSError:  # a folder we may only read
        now = time.time()
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _who(holder: dict) -> str:
    if "pid" not in holder:
        return f"a process whose lock.json is damaged (stale after {STALE_SECONDS:.0f} s)"
    host, started = holder.get("host"), holder.get("started")
    return f"process {holder['pid']} on {host}" + (f" (started {started})" if started else "")


def _identity() -> dict:
    return {
        "host": socket.gethostname(),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "birth": _birth(os.getpid()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _namespace() -> str:
    """Tells containers and reboots of one host name apart, where the system says so."""
    parts = []
    for read in (
        lambda: os.readlink("/proc/self/ns/pid"),
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts)


def _birth(pid: object) -> str | None:
    """When process `pid` began, so that a reused number is not taken for it; None when gone."""
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    fields = status.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Serialises looking at the lock and writing it."""
    with open(folder / ".lock.guard", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the heartbeat still decides
            yield
            return
        yield
