"""Processes of one job: start, wait for each other, compare notes, notice who is gone.

Called by every command that trains. Works under torchrun and the deepspeed launcher (both set RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) and alone. Every wait is bounded and its error
names the ranks that did not arrive: ranks leave a note in the job's key-value store before they
wait, so whoever is still there can list the absent ones.
"""

import functools
import getpass
import hashlib
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError
from .signals import StopRequested

FOREVER_S = 30 * 24 * 3600.0  # for `exchange`: the launcher ends ranks that wait for one that fails
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_STOP_GRACE_S = 20.0
_GRACE_S = 5.0  # how much later than rank 0 another rank may have started to wait


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the job.

    Attributes:
        rank: 0 .. size - 1.
        size: number of processes.
        local_rank: index of this process on its machine.
        device: where this rank's tensors live.
        hosts: "host:device" of every rank.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    hosts: tuple[str, ...] = ()
    store: Any = field(default=None, repr=False)
    control: Any = field(default=None, repr=False)  # a gloo group: flags without touching the GPU
    group: Any = field(default=None, repr=False)  # for collectives of tensors; None: all processes
    launcher: int = 0  # process id of the launcher; 0 when started by hand
    _turns: Counter = field(default_factory=Counter, repr=False)

    @property
    def launcher_gone(self) -> bool:
        """True once the launcher that started this rank has died: save and leave."""
        return self.launcher != 0 and os.getppid() != self.launcher


def start(timeout_s: float | None = None) -> World:
    """Join the job described by the environment, or be the only process.

    Args:
        timeout_s: how long to wait for the other ranks; by default ETUDE_START_SECONDS, or 60.

    Raises:
        UserError: the rendezvous cannot be reached, or ranks are missing (named with the hosts
            that did arrive).
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = _device(local_rank)
    here = f"{socket.gethostname()}:{device}"
    if size == 1:
        return World(rank, size, local_rank, device, (here,))
    timeout_s = _start_seconds() if timeout_s is None else timeout_s
    store = _connect(rank, timeout_s)
    world = World(rank, size, local_rank, device, store=store, launcher=os.getppid())
    hosts = tuple(exchange(world, "start", here, timeout_s))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    control = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
    return World(rank, size, local_rank, device, hosts, store, control, launcher=os.getppid())


def part(world: World, first: int) -> World:
    """The first `first` processes of a job as a world of its own, and the others as another.

    Every process calls it and gets the world that it belongs to, with ranks from 0; the whole job's
    world stays usable by all of them together.
    """
    if not 0 < first < world.size:
        raise ValueError(f"{world.size} processes cannot be parted at {first}")
    turn = world._turns["part"]
    world._turns["part"] += 1
    found = None
    for name, ranks in (("first", range(first)), ("others", range(first, world.size))):
        group = dist.new_group(list(ranks), timeout=_COLLECTIVE_TIMEOUT)
        control = dist.new_group(list(ranks), timeout=_COLLECTIVE_TIMEOUT, backend="gloo")
        if world.rank in ranks:
            found = World(
                world.rank - ranks[0],
                len(ranks),
                world.local_rank,
                world.device,
                world.hosts[ranks[0] : ranks[-1] + 1],
                dist.PrefixStore(f"{name}-{turn}", world.store),
                control,
                group,
                world.launcher,
            )
    assert found is not None
    return found


def stop(world: World, lost: Sequence[int] = ()) -> None:
    """Leave the job in order: wait for the others, then close the process groups.

    Args:
        lost: ranks that are known to be gone, and could be done without.
    """
    try:
        exchange(world, "barrier/stop", None, 60.0, without=lost)
    except UserError:
        if world.rank == 0:  # another rank loses contact when rank 0 was the first to leave
            raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} on {socket.gethostname()} has no GPU of its own "
            f"({count} visible); start at most {count} processes per machine"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _start_seconds() -> float:
    text = os.environ.get("ETUDE_START_SECONDS", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"ETUDE_START_SECONDS={text}: give the seconds to wait for all ranks, 60")
    return seconds


def _connect(rank: int, timeout_s: float) -> Any:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port:
        raise UserError(
            "WORLD_SIZE is set but MASTER_ADDR or MASTER_PORT is not; start with "
            "`torchrun --nproc-per-node N -m etude train RECIPE`"
        )
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = _store(host, int(port), rank == 0 and not hosted, timeout_s)
        store = dist.PrefixStore(f"etude-{attempt}", store)
        if hosted:
            # torchrun's store dies with torchrun, and its ranks must still be able to save
            store = _own_store(store, rank, host, int(port), timeout_s)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at {host}:{port} within "
            f"{timeout_s:.0f} s ({str(error).splitlines()[0][:120]}); check MASTER_ADDR, the port "
            "and the firewall"
        ) from None
    return store


def _store(host: str, port: int, is_master: bool, timeout_s: float) -> Any:
    return dist.TCPStore(
        host,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _own_store(launchers: Any, rank: int, host: str, port: int, timeout_s: float) -> Any:
    """A store that rank 0 holds; its address goes through the launcher's."""
    if rank == 0:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, port))  # sends nothing: asks which address faces the others
                mine = probe.getsockname()[0]
            except OSError:
                mine = host
        if mine.startswith("127."):  # the launcher's store is here, by a name that others resolve
            mine = host
        store = _store(mine, 0, True, timeout_s)
        launchers.set("store", f"{mine} {store.port}")
        return store
    mine, port = launchers.get("store").decode().split()
    return _store(mine, int(port), False, timeout_s)


def exchange(
    world: World,
    what: str,
    value: Any,
    timeout_s: float = 1800.0,
    *,
    without: Sequence[int] = (),
    stopped: Callable[[], str | None] = lambda: None,
) -> list[Any]:
    """Every rank's JSON-able `value`, in rank order; all ranks call it in the same order.

    Args:
        without: ranks that are not waited for and not answered.
        stopped: the reason to stop, if there is one; it ends the wait for ranks that never come.

    Raises:
        StopRequested: there was a reason to stop for a while, and ranks are still missing.
        UserError: some ranks did not arrive in `timeout_s` seconds; they are named.
    """
    if world.size == 1:
        return [value]
    turn = world._turns[what]
    world._turns[what] += 1
    keys = {rank: f"{what}/{turn}/{rank}" for rank in range(world.size) if rank not in without}
    world.store.set(f"{what}/{turn}/{world.rank}", json.dumps(value))
    try:
        _await(world, what, keys, timeout_s, stopped)
        values = [json.loads(world.store.get(key)) for key in keys.values()]
    except dist.DistError:
        where = world.hosts[0] if world.hosts else os.environ["MASTER_ADDR"]
        raise UserError(
            f"rank {world.rank} of {world.size} lost contact with rank 0 ({where}) at {what!r}; "
            "look at rank 0's own output"
        ) from None
    if turn > 1:  # everyone who is here has read the turn before the last
        world.store.delete_key(f"{what}/{turn - 2}/{world.rank}")
    return values


def on_first(world: World | None, what: str, decide: Callable[..., Any], *given: Any) -> Any:
    """What rank 0 decides, a JSON-able value, on every rank; all ranks call it in the same order.

    Raises:
        UserError, StopRequested: on every rank, where `decide` raised it on rank 0.
    """
    if world is None or world.size == 1:
        return decide(*given)
    told: list = ["", None]
    if world.rank == 0:
        try:
            told = ["", decide(*given)]
        except UserError as error:
            told = ["wrong", str(error)]
        except StopRequested as reason:
            told = ["stopped", str(reason)]
    end, value = exchange(world, what, told, FOREVER_S)[0]
    if end:
        raise UserError(value) if end == "wrong" else StopRequested(value)
    return value


def _await(
    world: World,
    what: str,
    keys: dict[int, str],
    timeout_s: float,
    stopped: Callable[[], str | None],
) -> None:
    deadline, patience = time.monotonic() + timeout_s, None
    while missing := [r for r, key in keys.items() if not world.store.check([key])]:
        if time.monotonic() > deadline:
            message = _absent(world, what, missing, timeout_s)
            if world.rank == 0:  # it may hold the store: let the others look before it leaves
                time.sleep(_GRACE_S)
            raise UserError(message)
        if reason := stopped():  # the others were asked too, and are on their way
            patience = patience or time.monotonic() + _STOP_GRACE_S
            if time.monotonic() > patience:
                raise StopRequested(reason)
        time.sleep(0.005)


def _absent(world: World, what: str, missing: list[int], timeout_s: float) -> str:
    where = [f"{r} ({world.hosts[r]})" if world.hosts else str(r) for r in missing]
    present = []
    for rank in set(range(world.size)) - set(missing):
        key = f"start/0/{rank}"
        there = world.hosts[rank] if world.hosts else json.loads(world.store.get(key))
        present.append(f"{rank} ({there})")
    plural = "s" if len(missing) > 1 else ""
    return (
        f"rank{plural} {', '.join(where)} of {world.size} did not reach {what!r} within "
        f"{timeout_s:.0f} s; present: {', '.join(present)}; look at the missing ranks' own output"
    )


def barrier(world: World, what: str, timeout_s: float = 1800.0) -> None:
    """Wait until every rank has reached `what`; a time-out names the ranks that are missing."""
    exchange(world, f"barrier/{what}", None, timeout_s)


def any_rank(world: World, flag: bool) -> bool:
    """True on every rank when `flag` is true on any; cheap enough for every step, no GPU sync."""
    if world.size == 1:
        return bool(flag)
    value = torch.tensor([int(flag)], dtype=torch.uint8)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=world.control)
    return bool(value.item())


def local_facts(**more: str) -> dict[str, str]:
    """What must be the same on every rank: code, revision, versions, plus the caller's own."""
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "code": git.stdout.strip() or "not a git checkout",
        "source": _source(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **more,
    }


@functools.cache
def _source() -> str:
    """Hash of Etude's Python files: two changed checkouts of one revision still differ."""
    engine = Path(__file__).resolve().parents[1]
    kernels = importlib.util.find_spec("etude.kernels")
    folders = {"kernels": Path(kernels.origin).parent, "engine": engine}
    digest = hashlib.sha256()
    for name, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder)
            if name == "kernels" or inside.parts[0] not in ("kernels", "recipes"):  # as in a wheel
                digest.update(f"{name}/{inside}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def all_agree(world: World, facts: dict[str, str], folder: Path | None = None) -> None:
    """Compare facts over all ranks before the first step; with `folder`, also that all see it.

    Args:
        facts: name -> value, for example code revision, versions, recipe and shard fingerprints.
        folder: the run folder; rank 0 leaves a token there that every rank must find.

    Raises:
        UserError: on every rank, naming each odd rank, its host, the field and both values.
    """
    facts = {key: str(value) for key, value in facts.items()}
    if folder is not None and world.size > 1:
        facts["run folder"] = _see_token(world, Path(folder))
    complaints = []
    everyone = exchange(world, "facts", facts)
    for key in sorted({key for entry in everyone for key in entry}):
        values = [entry.get(key, "missing") for entry in everyone]
        # ties go to rank 0's value, so that one of two ranks is always the odd one
        usual = max(values, key=lambda value: (values.count(value), value == values[0]))
        for rank, value in enumerate(values):
            if value != usual:
                where = world.hosts[rank] if world.hosts else "this machine"
                complaints.append(f"rank {rank} ({where}): {key} is {value!r}, others {usual!r}")
    if complaints:
        more = f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        listed = "; ".join(complaints[:8]) + more
        raise UserError(f"the ranks disagree, make them equal first: {listed}")


def _see_token(world: World, folder: Path) -> str:
    token = exchange(world, "token", uuid.uuid4().hex if world.rank == 0 else "")[0]
    path = folder / f".sight-{token}"
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    barrier(world, "token written")
    deadline = time.monotonic() + 10  # network file systems show a new file late
    while not path.exists() and time.monotonic() < deadline:
        os.listdir(folder) if folder.exists() else None
        time.sleep(0.1)
    seen = path.exists()
    barrier(world, "token seen")
    if world.rank == 0:
        path.unlink(missing_ok=True)
    return "visible" if seen else f"{folder} is not the folder that rank 0 writes"


def local_caches() -> Path:
    """Point compiler caches at this machine's own disk, unless the environment already says where.

    Sets TRITON_CACHE_DIR and TORCH_EXTENSIONS_DIR: on a shared home directory many ranks race on
    them. The folder is this environment's own, and its ninja comes first on PATH: another ninja or
    environment would find everything changed and build it all again. Returns the folder; clears
    build locks left by killed processes.
    """
    tag = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    version = f"py{sys.version_info[0]}.{sys.version_info[1]}-torch{torch.__version__}-{tag}"
    root = Path(tempfile.gettempdir()) / f"etude-cache-{getpass.getuser()}" / version
    for variable, name in (("TRITON_CACHE_DIR", "triton"), ("TORCH_EXTENSIONS_DIR", "extensions")):
        os.environ.setdefault(variable, str(root / name))
        Path(os.environ[variable]).mkdir(parents=True, exist_ok=True)
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        os.environ["PATH"] = programs + os.pathsep + os.environ.get("PATH", os.defpath)
    clear_stale_locks(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    return root


def clear_stale_locks(folder: Path) -> list[Path]:
    """Remove torch extension `lock` files that no running build holds; returns what was removed.

    A killed build leaves its lock behind and every later one waits on it without a word. A build
    runs ninja inside the lock's folder, so a lock is alive while a process works there.
    """
    removed = []
    for lock in [*folder.glob("*/lock"), *folder.glob("*/*/lock")]:
        try:
            young = time.time() - lock.stat().st_mtime < 5
            if not young and not _someone_works_in(lock.parent):
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:
            continue
    return removed


def _someone_works_in(folder: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return time.time() - (folder / "lock").stat().st_mtime < 1800
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(link) == str(folder.resolve()):
                return True
        except OSError:
            continue
    return False
