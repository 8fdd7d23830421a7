"""What each kind of arm learns from, and how that grows; called by course.py.

A source has a pool (or the real pictures), says what a round of it consists of, and puts a round
into the pool once its parts are there. The kinds of arms are described in recipe.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from etude.core.distributed import World
from etude.core.strategy import StrategyConfig
from etude.data.pool import Pool
from etude.data.pool_parts import PartKey, link_file, link_part, write_part

from .arms import Pending
from .feed import Fetch, mixed_feed, pool_feed, real_feed
from .learner import Learner
from .pictures import Pictures
from .pruning import PruneConfig, candidate_scores, select
from .recipe import ArmConfig, PracticeRecipe
from .supply import CANDIDATES, Request, Supply, extra_of, learner_file, passes


@dataclass
class Source:
    """Real pictures: nothing is drawn, nothing is added. The base of the other sources.

    Attributes:
        title: of the arm.
        pool: the arm's own; None for real pictures alone.
        rounds_at: the steps at which rounds are asked for; None where the monitor decides.
        guide: name of the learner that guides every round; None takes the learner of the moment.
    """

    title: str
    recipe: PracticeRecipe
    supply: Supply
    real: Pictures | None = None
    pool: Pool | None = None
    rounds_at: Sequence[int] | None = ()
    guide: str | None = ""

    @property
    def fetch(self) -> Fetch:
        """The pictures that positions show."""
        assert self.real is not None
        return real_feed(self.real, self.recipe.seed)

    @property
    def samples(self) -> int:
        """Different pictures that it shows now."""
        return len(self.real) if self.real is not None else 0

    @property
    def drawn(self) -> int:
        """Different generated pictures that it shows now."""
        return 0 if self.pool is None else self.samples

    @property
    def cost(self) -> dict[str, float]:
        """What drawing everything took that the arm needed."""
        return {}

    def has(self, number: int) -> bool:
        """Whether a round is whole."""
        return True

    def request(self, pending: Pending) -> Request:
        """The parts that a round needs."""
        raise NotImplementedError

    def publish(self, pending: Pending, request: Request) -> None:
        """Put a round into the pool, in one process, once its parts are there."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Follow what another process published."""

    def rewind(self, position: int) -> None:
        """Withdraw what was published for later positions, in one process."""

    @property
    def own_pools(self) -> list[Pool]:
        """The pools that it adds to."""
        return []


class Rounds(Source):
    """N pictures, then rounds of P: the arms practice, omega0 and frozen."""

    pool: Pool

    @property
    def fetch(self) -> Fetch:
        return pool_feed(self.pool, self.recipe.seed, self.recipe.newest_weight)

    @property
    def samples(self) -> int:
        return len(self.pool)

    @property
    def cost(self) -> dict[str, float]:
        return self.pool.cost()

    def has(self, number: int) -> bool:
        return len(self.pool) >= self.recipe.size(number)

    def request(self, pending: Pending) -> Request:
        number, recipe = pending.round, self.recipe
        first, end = (recipe.size(number - 1) if number else 0), recipe.size(number)
        twins = min(recipe.probe_samples, end - first) if pending.learner else 0
        return Request(
            self.pool.folder.name,
            number,
            self.supply.keys(first, end, pending.learner),
            self.supply.keys(first, first + twins) if twins else (),
        )

    def publish(self, pending: Pending, request: Request) -> None:
        if not self.has(pending.round):
            self.pool.publish(
                request.keys, round_number=pending.round, visible_from=self._position(pending)
            )

    def refresh(self) -> None:
        for pool in self.own_pools:
            pool.refresh()

    def rewind(self, position: int) -> None:
        for pool in self.own_pools:
            pool.rewind(position)

    @property
    def own_pools(self) -> list[Pool]:
        return [self.pool]

    def _position(self, pending: Pending) -> int:
        return pending.visible_at * self.recipe.learner.batch


@dataclass
class Static(Rounds):
    """All pictures from the start, unguided: the arm static, and with real ones the arm mixed.

    Attributes:
        count: how many.
    """

    count: int = 0
    real_share: float | None = None

    @property
    def fetch(self) -> Fetch:
        drawn = pool_feed(self.pool, self.recipe.seed)
        if self.real_share is None:
            return drawn
        return mixed_feed(super(Rounds, self).fetch, drawn, self.real_share, self.recipe.seed)

    @property
    def samples(self) -> int:
        return len(self.pool) + (len(self.real) if self.real_share and self.real is not None else 0)

    @property
    def drawn(self) -> int:
        return len(self.pool)

    def has(self, number: int) -> bool:
        return len(self.pool) >= self.count

    def request(self, pending: Pending) -> Request:
        edges, number = [0], 0
        while edges[-1] < self.count:  # in the rounds of the other arms, to share their parts
            edges.append(min(self.recipe.size(number), self.count))
            number += 1
        keys = [
            key for a, b in zip(edges, edges[1:], strict=False) for key in self.supply.keys(a, b)
        ]
        return Request(self.pool.folder.name, 0, tuple(keys))


@dataclass
class Pruned(Rounds):
    """Rounds that a score chooses from more pictures than are kept, unguided: the arm prune.

    Attributes:
        candidates: all pictures that were drawn to choose from, the start set among them.
        config: which of them are kept.
        classes: how many there are.
        device: where proxies are trained.
    """

    candidates: Pool | None = None
    config: PruneConfig = PruneConfig()
    classes: int = 0
    device: Any = "cpu"

    @property
    def cost(self) -> dict[str, float]:
        return self._all.cost()

    @property
    def _all(self) -> Pool:
        assert self.candidates is not None
        return self.candidates

    def request(self, pending: Pending) -> Request:
        first, end = self._range(pending.round)
        return Request(self._all.folder.name, pending.round, self.supply.keys(first, end))

    def _range(self, number: int) -> tuple[int, int]:
        start = self.recipe.start_samples
        if number == 0:
            return 0, start
        each = self.config.candidates(self.recipe.round_samples, self.classes)
        return start + (number - 1) * each, start + number * each

    def publish(self, pending: Pending, request: Request) -> None:
        position, number = self._position(pending), pending.round
        if len(self._all) < self._range(number)[1]:
            self._all.publish(request.keys, round_number=number, visible_from=position)
        if self.has(number):
            return
        if number == 0:
            for key in request.keys:
                link_part(self._all.folder / key.folder, self.pool.folder)
            self.pool.publish(request.keys, round_number=0, visible_from=position)
            return
        keys = self._choose(pending)
        self.pool.publish(keys, round_number=number, visible_from=position)

    def _choose(self, pending: Pending) -> list[PartKey]:
        """Writes the parts of the pictures that a round keeps."""
        first, end = self._range(pending.round)
        rows = np.arange(first, end)
        candidates = _Some(self._all, rows)
        learner = self.supply.studio.guide(self.pool.folder.name, pending.learner)
        scores = candidate_scores(
            self.config,
            candidates,
            learner,
            lambda number: self._proxy(candidates, pending.round, number),
        )
        kept = select(
            scores,
            self._all.labels(rows),
            self.recipe.round_samples,
            self.config,
            seed=self.recipe.seed,
            number=pending.round,
            classes=self.classes,
            ids=rows,
        )
        chosen, keys = rows[kept], []
        for start in range(0, len(chosen), self.supply.chunk):
            some = chosen[start : start + self.supply.chunk]
            key = PartKey(
                len(self.pool) + start,
                len(some),
                self.recipe.seed,
                {"prune": self.config.model_dump(mode="json"), "from": [first, end]},
                self.supply.facts.fingerprint,
                pending.learner,
                extra_of(self.supply.facts.protocol, self.classes, some),
            )
            write_part(
                self.pool.folder,
                key,
                self._all.images(some),
                self._all.labels(some),
                seed_indices=some,
                entropies=np.full(len(some), np.nan, np.float32),
            )
            keys.append(key)
        return keys

    def _proxy(self, pictures: Pictures, number: int, proxy: int) -> Iterator[nn.Module]:
        """Trains a learner of its own on candidates; see `pruning.proxy_scores`."""
        config = self.recipe.learner
        seed = (self.recipe.seed + 1 + 1_000 * number + proxy) % 2**32
        alone = World(0, 1, 0, torch.device(self.device))
        learner = Learner(config, seed, alone, StrategyConfig(kind="local"))
        fetch, looks = real_feed(pictures, seed), set(self.config.look_steps())
        for step in range(self.config.proxy_steps):
            learner.step(fetch, step, 1.0)
            if step + 1 in looks:
                learner.refuse_nonfinite(step + 1)
                yield learner.frozen("raw")

    @property
    def own_pools(self) -> list[Pool]:
        return [self.pool, self._all]


@dataclass
class Branch(Rounds):
    """The practice arm's pool as it was before one of its rounds; nothing is added to it.

    Attributes:
        last_round: the newest round that it shows.
    """

    last_round: int = 0

    @property
    def fetch(self) -> Fetch:
        recipe = self.recipe
        return pool_feed(self.pool, recipe.seed, recipe.newest_weight, self.last_round)

    @property
    def samples(self) -> int:
        return self.recipe.size(self.last_round)

    @property
    def cost(self) -> dict[str, float]:
        return self.pool.cost(self.samples)

    @property
    def own_pools(self) -> list[Pool]:
        return []  # the pool is the practice arm's


@dataclass(frozen=True)
class _Some:
    """Some of a pool's pictures, by their place among them."""

    pool: Pool
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self.pool.images(self.rows[indices])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self.pool.labels(self.rows[indices])


def open_source(
    arm: ArmConfig,
    title: str,
    recipe: PracticeRecipe,
    supply: Supply,
    *,
    real: Pictures | None,
    practice: dict | None,
    pools: Path,
    last_round: int,
    device: Any,
) -> Source:
    """The source of an arm.

    Args:
        practice: the practice arm's result, for arms that copy it.
        pools: folder of the pools of the run that holds the practice arm.
        last_round: of a branch.
    """
    if arm.kind == "real":
        return Source(title, recipe, supply, real)
    if arm.kind == "branch":
        shared = Pool(pools / "practice")
        return Branch(title, recipe, supply, real, shared, last_round=last_round)
    pool = Pool(supply.root / title)
    if arm.kind == "practice":
        return Rounds(title, recipe, supply, real, pool, rounds_at=None, guide=None)
    assert practice is not None
    classes, added_at = len(supply.facts.classes), practice["added_at"]
    if arm.kind in ("static", "mixed"):
        count = practice["samples"]
        if arm.equal == "compute":
            each = _passes_per_picture(Pool(pools / "practice"), plain=True)
            count = max(int(practice["passes"] / each) // classes, 1) * classes
        share = (arm.real_share or 0.5) if arm.kind == "mixed" else None
        return Static(title, recipe, supply, real, pool, count=count, real_share=share)
    if arm.kind == "omega0":
        return Rounds(title, recipe, supply, real, pool, rounds_at=added_at, guide="")
    if arm.kind == "frozen":
        guide = _first_guide(pools / "practice", pool.folder)
        return Rounds(title, recipe, supply, real, pool, rounds_at=added_at, guide=guide)
    assert arm.prune is not None
    config = arm.prune
    if arm.equal == "compute" and added_at:
        shared = Pool(pools / "practice")
        factor = _passes_per_picture(shared, plain=False) / _passes_per_picture(shared, plain=True)
        config = config.model_copy(update={"oversampling": max(factor, 1.0)})
    return Pruned(
        title,
        recipe,
        supply,
        real,
        pool,
        rounds_at=added_at,
        guide=None,
        candidates=Pool(supply.root / f"{title}{CANDIDATES}"),
        config=config,
        classes=classes,
        device=device,
    )


def _first_guide(practice: Path, pool: Path) -> str:
    """The learner that guided the first round, put where the other pool keeps its own."""
    guided = next((entry for entry in Pool(practice).parts if entry.learner), None)
    if guided is None:
        return ""
    link_file(learner_file(practice, guided.learner), learner_file(pool, guided.learner))
    return guided.learner


def _passes_per_picture(pool: Pool, *, plain: bool) -> float:
    """What drawing a picture of the start set, or of the rounds after it, took."""
    start, every = pool.cost(pool.ends[0]), pool.cost()
    if plain:
        return passes(start) / pool.ends[0]
    return (passes(every) - passes(start)) / (len(pool) - pool.ends[0])
