"""Where generated pictures come from: requests for parts of pools, and who draws them.

Called by course.py (which asks), by practising.py (in processes that only draw) and by rebuild.py.
A request is a file in its pool that names parts (`data/pool_parts.py`) by all that fixes them:
picture i of a run has label i mod classes and the noise of index i, and is guided by the learner of
that moment or not at all. Whoever serves a request claims a part, draws it and writes it, whole or
not at all, so any number of processes share the work, and what a killed one leaves is drawn by
another. Parts that another pool of the run has already are linked, and the cost of drawing them is
booked in both.
"""

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from etude.core.errors import UserError
from etude.core.files import read_json, write_bytes_atomic, write_json_atomic
from etude.core.lock import Lock, is_stale, read_lock
from etude.data.pool_parts import PartKey, link_part, write_part
from etude.diffusion.guidance import GuidanceConfig

from .learner import LearnerConfig, frozen_bytes, load_frozen, weights_hash
from .pictures import chunks, to_model
from .scores import entropy

STOPPING = "stopping"  # in the folder of all pools: one of the processes was asked to stop
CLOSED = "closed.json"  # in the folder of all pools: nothing more will be asked for
ORIGIN = "origin.json"  # in a pool: the generator, and how it and its learners are opened
CANDIDATES = ".candidates"  # behind an arm's name: the pool that its pictures are chosen from
_COUNTED = ("nonfinite", "held")  # what guidance reports of its steps, added up over a part
_POLL_S = 0.1
_LOOK_S = 2.0  # between two looks whether a process that draws is alive
_SCORED = 64  # pictures whose entropy is taken at a time; parts of a pool never share a batch


class Generator(Protocol):
    """What practice asks of a generator; `etude.sampling.Generator` is one.

    Attributes:
        name, fingerprint: for people, and the identity of its weights.
        protocol: everything else that fixes its pictures, JSON-serialisable.
        classes: names in index order.
        training_shards: folder of the pictures it was trained on; empty when not known.
        image_size: pixels along a side of what it draws.
        evaluations: rows that its denoiser has predicted so far.
        gradients: rows that its denoiser has been differentiated for so far.
        device: where it draws.
    """

    name: str
    fingerprint: str
    classes: list[str]
    training_shards: str
    device: torch.device

    @property
    def image_size(self) -> int: ...

    @property
    def protocol(self) -> dict[str, Any]: ...

    @property
    def evaluations(self) -> int: ...

    @property
    def gradients(self) -> int: ...

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


@dataclass(frozen=True)
class Facts:
    """What the learners know of a generator that other processes hold; see `Generator`."""

    name: str
    fingerprint: str
    protocol: dict[str, Any]
    classes: list[str]
    training_shards: str
    image_size: int

    @classmethod
    def of(cls, generator: Generator) -> "Facts":
        """The facts of an open generator."""
        return cls(
            generator.name,
            generator.fingerprint,
            generator.protocol,
            list(generator.classes),
            generator.training_shards,
            generator.image_size,
        )


@dataclass(frozen=True)
class Request:
    """Parts that a pool is to get; see `Supply.request`.

    Attributes:
        pool: name of the pool's folder below that of all pools.
        round: the addition that they are for.
        keys: the parts to be published, in the order of their indices.
        beside: parts that are wanted for comparison only.
    """

    pool: str
    round: int
    keys: tuple[PartKey, ...]
    beside: tuple[PartKey, ...] = ()

    def post(self, root: Path) -> None:
        """Put the request where generators look."""
        parts = {name: [asdict(key) for key in getattr(self, name)] for name in ("keys", "beside")}
        write_json_atomic(self._path(root), {"round": self.round} | parts)

    def withdraw(self, root: Path) -> None:
        """All parts are there: nobody needs to look any more."""
        self._path(root).unlink(missing_ok=True)

    def _path(self, root: Path) -> Path:
        return root / self.pool / "requests" / f"{self.round:05d}.json"

    @classmethod
    def read(cls, path: Path) -> "Request":
        """A request that was posted."""
        content = read_json(path)
        parts = {n: tuple(PartKey(**k) for k in content[n]) for n in ("keys", "beside")}
        return cls(path.parents[1].name, content["round"], **parts)

    @property
    def wanted(self) -> tuple[PartKey, ...]:
        """All parts that are to be written."""
        return self.keys + self.beside

    def missing(self, root: Path, among: Sequence[PartKey] | None = None) -> list[PartKey]:
        """The parts, all or some of them, that nobody has written yet, in their order."""
        keys = self.wanted if among is None else among
        return [key for key in keys if not (root / self.pool / key.folder).is_dir()]


class Studio:
    """Draws parts: a generator and the frozen learners that guide it.

    Args:
        open_generator: makes the generator when the first part is drawn.
        learner: how a learner is built before its stored weights are put into it.
        root: folder of all pools.
        device: where learners guide, which is where the generator draws.
    """

    def __init__(
        self,
        open_generator: Callable[[], Generator],
        learner: LearnerConfig,
        root: Path,
        device: torch.device,
    ) -> None:
        self._open, self.learner, self.root, self.device = open_generator, learner, root, device
        self._generator: Generator | None = None
        self._guide: tuple[str, nn.Module] | None = None

    @property
    def generator(self) -> Generator:
        """The generator, opened when it is needed first."""
        if self._generator is None:
            self._generator = self._open()
        return self._generator

    def remember(self, name: str, learner: nn.Module) -> None:
        """Spare reading the weights of a learner that this process has in memory."""
        self._guide = (name, learner)

    def make(self, pool: str, key: PartKey) -> None:
        """Draw a part and write it."""
        indices = np.arange(key.first, key.first + key.count)
        labels = labels_in_turn(indices, len(self.generator.classes))
        images, entropies, cost = self.draw_indices(
            pool, indices, labels, seed=key.seed, learner=key.learner, guidance=key.guidance
        )
        write_part(
            self.root / pool,
            key,
            images,
            labels,
            seed_indices=indices,
            entropies=entropies,
            cost=cost,
        )

    def draw_indices(
        self,
        pool: str,
        indices: np.ndarray,
        labels: np.ndarray,
        *,
        seed: int,
        learner: str,
        guidance: dict[str, Any] | None,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Pictures (n, S, S, C) uint8, their entropies (n,) float32, nan where nothing guides, and
        what drawing them took, with the guided steps that left a picture alone.

        Args:
            learner: name of the learner in the pool that guides, "" for none.
        """
        generator, guide = self.generator, self.guide(pool, learner) if learner else None
        began = time.perf_counter()
        before = generator.evaluations, generator.gradients
        images, telemetry = generator.draw(
            indices,
            labels,
            seed=seed,
            learner=guide,
            guidance=GuidanceConfig.model_validate(guidance) if guide else None,
        )
        cost = {
            "evaluations": generator.evaluations - before[0],
            "gradients": generator.gradients - before[1],
            "seconds": time.perf_counter() - began,
        }
        counted = [name for name in _COUNTED if name in telemetry]
        cost |= {name: float(telemetry[name].sum()) for name in counted}
        return images, self._entropies(guide, images), cost

    def guide(self, pool: str, name: str) -> nn.Module:
        """The frozen learner that a pool keeps under a name."""
        if self._guide is None or self._guide[0] != name:
            path = learner_file(self.root / pool, name)
            learner = load_frozen(self.learner, path).to(self.device)
            if weights_hash(learner) != name:
                raise UserError(f"{path} is not the learner that the pool names: restore the file")
            self._guide = (name, learner)
        return self._guide[1]

    @torch.no_grad()
    def _entropies(self, learner: nn.Module | None, images: np.ndarray) -> np.ndarray:
        if learner is None:
            return np.full(len(images), np.nan, np.float32)
        parts = [
            entropy(learner(to_model(images[rows], self.device)).float()).cpu().numpy()
            for rows in chunks(np.arange(len(images)), _SCORED)
        ]
        return np.concatenate(parts)


class Supply:
    """What one process knows of the pools of a run: asks for parts, and waits for or draws them.

    Args:
        facts: the generator, wherever it is.
        studio: draws here; where `apart`, only when no process that should draw is alive.
        chunk: pictures of a part.
        place: this process among those that draw, and how many there are, to begin at different
            parts.
        apart: other processes draw.
        origin: how the generator was opened; kept in the pools, for `rebuild`.
    """

    def __init__(
        self,
        facts: Facts,
        studio: Studio,
        guidance: GuidanceConfig,
        seed: int,
        chunk: int,
        *,
        place: tuple[int, int] = (0, 1),
        apart: bool = False,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.facts, self.studio, self.guidance, self.seed = facts, studio, guidance, seed
        self.chunk, self.place, self.apart = chunk, place, apart
        self.root, self.origin = studio.root, origin

    def keys(self, first: int, end: int, learner: str = "") -> tuple[PartKey, ...]:
        """The parts of pictures `first` to `end` - 1, guided by a learner that was kept, or plain.

        Parts end at whole multiples of `chunk`, so that a part is the same whoever asks for it.
        """
        guidance = self.guidance.model_dump(mode="json") if learner else None
        extra = extra_of(self.facts.protocol, len(self.facts.classes))
        edges = [first, *range((first // self.chunk + 1) * self.chunk, end, self.chunk), end]
        return tuple(
            PartKey(low, high - low, self.seed, guidance, self.facts.fingerprint, learner, extra)
            for low, high in zip(edges, edges[1:], strict=False)
        )

    def describe(self, pool: str) -> None:
        """Leave in a pool how its pictures can be drawn again."""
        about = asdict(self.facts) | {
            "learner": self.studio.learner.model_dump(mode="json"),
            "opened": self.origin,
        }
        write_json_atomic(self.root / pool / ORIGIN, about)

    def forget(self, title: str) -> None:
        """Withdraw what an earlier process asked for an arm: it is asked for again if needed."""
        for name in (title, f"{title}{CANDIDATES}"):
            shutil.rmtree(self.root / name / "requests", ignore_errors=True)

    def keep_learner(self, pool: str, learner: nn.Module) -> str:
        """Store a frozen learner in a pool, for whoever draws; returns its name there."""
        name = weights_hash(learner)
        path = learner_file(self.root / pool, name)
        if not path.exists():
            write_bytes_atomic(path, frozen_bytes(learner))
        self.studio.remember(name, learner)
        return name

    def complete(
        self, request: Request, stopped: Callable[[], bool], advance: Callable[[int], None]
    ) -> bool:
        """Draw what nobody has drawn yet, or wait for it; False when stopped before that.

        Args:
            advance: called with the number of parts that are there.
        """
        if not self.apart:
            return serve(request, self.studio, stopped, advance, self.place)
        if self.place[0]:  # one process looks; the others wait for it
            return True
        looked, pause, missing = 0.0, _POLL_S, list(request.wanted)
        while missing := request.missing(self.root, missing):
            if stopped():
                return False
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                if not attending(self.root):
                    return serve(request, self.studio, stopped, advance, self.place)
            advance(len(request.wanted) - len(missing))
            time.sleep(pause)
            pause = min(2.0 * pause, 1.0)
        return True


def serve(
    request: Request,
    studio: Studio,
    stopped: Callable[[], bool],
    advance: Callable[[int], None] = lambda there: None,
    place: tuple[int, int] = (0, 1),
) -> bool:
    """Draw the parts of a request that are neither there nor in somebody's hands, until all are
    there; False when stopped before that."""
    root, rank, size = studio.root, *place
    waiting = [key for lead in range(size) for key in request.wanted[(rank + lead) % size :: size]]
    while waiting := request.missing(root, waiting):
        held = 0
        for done, key in enumerate(waiting, start=1):
            if stopped():
                return False
            held += not _make_once(request.pool, key, studio)
            advance(len(request.wanted) - len(waiting) + done - held)
        if held:
            time.sleep(_POLL_S)
    return True


def _make_once(pool: str, key: PartKey, studio: Studio) -> bool:
    """Have a part made unless another process is at it, which is answered by False."""
    folder = studio.root / pool
    if (folder / key.folder).is_dir():
        return True
    twin = next(studio.root.glob(f"*/{key.folder}"), None)
    if twin is not None:
        link_part(twin, folder)
        return True
    claim = folder / "claims" / key.folder
    claim.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(claim)
    except UserError:
        return False
    try:
        if not (folder / key.folder).is_dir():
            studio.make(pool, key)
    finally:
        lock.release()
    return True


def attend(studio: Studio, number: int, stopped: Callable[[], str | None]) -> dict[str, Any]:
    """Draw for a run until it closes its pools: the whole life of a process that only draws.

    Args:
        number: of this process among those that draw.
        stopped: the reason to stop, if there is one.

    Returns:
        {} or {"stopped": reason} when the run, or this process, was asked to stop.

    Raises:
        UserError: the processes that learn failed.
    """
    lock, looked = studio.root.parent / "lock.json", time.monotonic()
    while not (closed := studio.root / CLOSED).exists():
        if reason := stopped():
            return {"stopped": reason}
        if time.monotonic() - looked > _LOOK_S:
            looked, holder = time.monotonic(), read_lock(lock)
            if holder is None or is_stale(lock, holder):
                return {"stopped": "the processes that learn are gone"}
        for path in sorted(studio.root.glob("*/requests/*.json")):
            try:
                request = Request.read(path)
            except UserError:  # it was published a moment ago
                continue
            serve(request, studio, lambda: bool(stopped()), place=(number, number + 1))
        time.sleep(_POLL_S)
    found = read_json(closed)
    if found["failed"]:
        raise UserError(f"the processes that learn failed: {found['failed']}")
    return {"stopped": found["stopped"]} if found["stopped"] else {}


class Attendance:
    """While it is open, a process that only draws is known to be alive."""

    def __init__(self, root: Path, number: int) -> None:
        # A name of its own: the process of an earlier start may be still there.
        self._folder = root / "drawing" / f"{number:05d}-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> None:
        self._folder.mkdir(parents=True)
        self._lock = Lock(self._folder)

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        shutil.rmtree(self._folder, ignore_errors=True)


def attending(root: Path) -> set[int]:
    """Numbers of the processes that only draw and are alive."""
    found = set()
    for path in root.glob("drawing/*/lock.json"):
        holder = read_lock(path)
        if holder is not None and not is_stale(path, holder):
            found.add(int(path.parent.name.split("-")[0]))
    return found


def learner_file(pool: Path, name: str) -> Path:
    """Where a pool keeps the weights of a learner that guided some of its pictures."""
    return pool / "learners" / f"{name}.safetensors"


def extra_of(
    protocol: Mapping[str, Any], classes: int, chosen: np.ndarray | None = None
) -> dict[str, Any]:
    """What else fixes a part's pictures: the protocol, and which of many were chosen."""
    extra = {"protocol": protocol, "classes": classes}
    if chosen is None:
        return extra
    indices = np.ascontiguousarray(chosen, dtype=np.int64)
    return extra | {"chosen": hashlib.sha256(indices.tobytes()).hexdigest()}


def labels_in_turn(indices: np.ndarray, classes: int) -> np.ndarray:
    """Classes in turn, (n,) int64, so that every whole round is balanced."""
    return np.asarray(indices, np.int64) % classes


def passes(cost: Mapping[str, float]) -> float:
    """What drawing took in evaluations of the denoiser, a backward pass counting as two."""
    return cost.get("evaluations", 0.0) + 2.0 * cost.get("gradients", 0.0)
