"""A plan from its recipe to its table: real pictures once, then candidate after candidate.

Called by jobs.py on every process. In order: the data sets' real pictures go through the
extractors; each candidate draws its pictures, which go through the extractors once for all metrics
and groups; every figure becomes a row of the table with its estimate. With a screen, all candidates
first draw few pictures under a seed of their own, and only the best go on. Whatever is in the
table, the store or the folder of drawn pictures already is not made again, so the same command goes
on anywhere.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from etude.core.distributed import FOREVER_S, World, exchange, on_first
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.registry import load_file
from etude.core.run import Run
from etude.metrics.alignment import SCORERS, Scorer, open_scorer
from etude.metrics.extractors import FETCHED, Extractor, taps_by_kind
from etude.metrics.shortages import shortages
from etude.metrics.store import FeatureStore

from ..datasets import DataSet, Prompts, open_data_set
from ..decoding import Form
from ..extract import device_for, extract_set
from ..picture_set import PictureSet, Stages, digest
from ..results import Results, Row, refuse_two_sources
from ..table import ResultsTable
from .candidates import Candidate, candidates, check_kinds, is_kept
from .drawing import DrawnPictures, class_prompts, mixed
from .folders import PromptedFolder, check_folders, check_prompts
from .measuring import Features, Found, Sides, Wanted, measured, scored, template
from .recipe import (
    DataSetConfig,
    FeaturesConfig,
    PlanRecipe,
    asked_metrics,
    is_scorer,
    opened_metrics,
)
from .scoring import score_set, scores_key, stated
from .screening import check_names, promoted

SHOWN_SIDE = 256  # of pictures on the page that come in several sizes, pixels
LOOK_S = 30  # between two looks at the checkpoints of models that are being trained


@dataclass(frozen=True)
class Shown:
    """Pictures of one data set side by side: the first prompts, drawn by every candidate.

    Attributes:
        prompts: what was asked for.
        pictures: candidate -> (prompts, H, W, C) uint8.
    """

    data_set: str
    prompts: list[str]
    pictures: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Set:
    """A data set of the plan, opened."""

    name: str
    opened: DataSet
    real: PictureSet | None
    prompts: Prompts


class Plan:
    """A plan that is being carried out.

    Args:
        world: the processes that share the drawing, extracting and measuring.
    """

    def __init__(self, recipe: PlanRecipe, run: Run, log: Log, world: World | None = None) -> None:
        for path in recipe.files:
            load_file(path)
        self.recipe, self.log, self.world = recipe, log, world
        self.device = device_for(recipe.device, world)
        self.wanted = [Wanted(*found) for found in opened_metrics(recipe)]
        self.extractors = list(open_extractors(recipe, self.wanted, self.device))
        self.scorers = open_scorers(recipe, self.extractors, self.device)
        self.store = FeatureStore(recipe.store)
        self.table = ResultsTable(recipe.table or run.folder / "results")
        self.pictures = run.folder / "pictures"
        self.form = Form(recipe.image_size, recipe.fit, recipe.channels)
        self.features = Features(self.store, self.extractors)
        self.rates: dict[str, dict[str, float]] = {}
        self.short: dict[str, list[str]] = {}  # data set -> what has too few pictures, and why
        self.shown: dict[str, Shown] = {}
        self.protocols: set[str] = set()  # of its figures
        self._opened: tuple[str, Any] | None = None
        check_kinds(recipe)
        check_folders(recipe)
        self.sets = [self._open(name, config) for name, config in recipe.data_sets.items()]
        check_prompts(recipe, [one.prompts for one in self.sets])

    def results(self) -> tuple[Results, dict[str, int]]:
        """The table's rows that compare with this plan's, other plans' too; and how many do not, by
        data set.
        """
        found = self.table.read()
        rows = [row for row in found.rows if row.protocol in self.protocols]
        other = Counter(r.data_set for r in found.rows if r.protocol not in self.protocols)
        return Results(tuple(rows), found.estimates), dict(other)

    def run(self, changed: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Everything that is missing, and with `watch_minutes` whatever comes.

        Args:
            changed: called on rank 0 whenever the table has new rows.

        Returns:
            The table's folder, who was evaluated, images per second: plain values.
        """
        for one in self.sets:
            self._extract_real(one)
        seen: list[Candidate] = []
        reported: list[Candidate] = []
        newest = time.monotonic()
        while True:
            found = self._found()
            new = [candidate for candidate in found if candidate not in seen]
            # Whom a screen promotes depends on all of them.
            coming = [c for c in self.promoted(found) if c not in reported] if new else []
            for candidate in coming:
                if not self._is_kept(candidate):
                    continue
                for one in self.sets:
                    self._evaluate(candidate, one, self.recipe.samples, self.recipe.seed)
                reported.append(candidate)
                if self._leads:
                    self.table.write()
                    changed()
            seen += new
            newest = time.monotonic() if new else newest
            if not self._waits(newest):
                break
        if self.recipe.watch_minutes is not None and not seen:
            sources = " and ".join(
                f"models.{n}.source={m.source}" for n, m in self.recipe.models.items()
            )
            raise UserError(
                f"no checkpoint came in {self.recipe.watch_minutes:g} minutes; check {sources}, or"
                " wait longer with --watch MINUTES"
            )
        return {
            "table": str(self.table.folder),
            "candidates": [candidate.title for candidate in reported],
            "images_per_second": self.rates,
        }

    def promoted(self, found: list[Candidate]) -> list[Candidate]:
        """The candidates that go on after the screen; all of them without one."""
        screen = self.recipe.screen
        if screen is None:
            return found
        rows: list[Row] = []
        for candidate in filter(self._is_kept, found):
            for one in self.sets:
                self._evaluate(candidate, one, screen.samples, screen.seed, selected=True)
                on_first(self.world, "rows of a screen", self._screened, candidate, one, rows)
        numbers = on_first(self.world, "who goes on", self._chosen, found, rows)
        kept = [found[number] for number in numbers]
        self.log.info(
            f"{len(kept)} of {len(found)} candidates go on after {screen.samples} pictures each: "
            + "; ".join(candidate.title for candidate in kept)
        )
        return kept

    def _screened(self, candidate: Candidate, one: _Set, rows: list[Row]) -> None:
        """Add what the screen measured of a candidate; raise where its figures are not there."""
        row = template(candidate, one.name, self.recipe.screen.seed, selected=True)
        same = "model", "checkpoint", "guidance", "training_seed", "seed", "data_set", "selected"
        found = [
            r
            for r in self.table.rows()
            if all(getattr(r, name) == getattr(row, name) for name in same)
            and r.protocol in self.protocols  # a shared table may hold other plans' screens
        ]
        check_names(found, self.recipe.screen)
        rows += found

    def _chosen(self, found: list[Candidate], rows: list[Row]) -> list[int]:
        return [found.index(one) for one in promoted(found, rows, self.recipe.screen)]

    def _found(self) -> list[Candidate]:
        """The candidates that rank 0 sees: a checkpoint may appear between two looks."""

        def there() -> list[list]:
            return [[c.run, c.checkpoint, c.guidance] for c in candidates(self.recipe)]

        found = on_first(self.world, "candidates", there)
        return [Candidate.of(self.recipe, *one) for one in found]

    def _is_kept(self, candidate: Candidate) -> bool:
        """Whether its checkpoint is still there, as rank 0 sees it."""
        if self.recipe.watch_minutes is None:
            return True
        kept = on_first(self.world, "whether it is kept", is_kept, candidate)
        if not kept:
            self.log.warn(f"{candidate.title} is left out: its run does not keep it any more")
        return kept

    def _waits(self, newest: float) -> bool:
        """Wait for the next look at the checkpoints; False when nothing is waited for any more."""
        minutes = self.recipe.watch_minutes
        late = minutes is None or time.monotonic() - newest > 60.0 * minutes
        if self.world is not None and self.world.size > 1:  # clocks differ: rank 0's counts
            late = exchange(self.world, "whether to go on", late, FOREVER_S)[0]
        if late:
            return False
        with self.log.progress("waiting for checkpoints", LOOK_S, unit="seconds") as progress:
            for _ in range(LOOK_S):
                time.sleep(1.0)
                progress.advance(1)
        return True

    @property
    def _leads(self) -> bool:
        return self.world is None or self.world.rank == 0

    def _open(self, name: str, config: DataSetConfig) -> _Set:
        opened = open_data_set(config.kind, config.folder, **config.options)
        recipe = self.recipe
        real = opened.pictures(
            size=recipe.image_size, fit=recipe.fit, channels=recipe.channels, limit=config.real
        )
        if real is None and any(wanted.metric.needs_real for wanted in self.wanted):
            first = next(w.metric.name for w in self.wanted if w.metric.needs_real)
            raise UserError(
                f"data_sets.{name} has prompts and no real pictures, which {first} needs; evaluate"
                " it in a plan of its own, with metrics of drawn pictures alone"
            )
        prompts = opened.prompts()
        if prompts is None:
            classes = real.classes if real is not None else ()
            drawing = [model for model, of in recipe.models.items() if of.kind != "pictures"]
            if not classes and drawing:
                raise UserError(
                    f"data_sets.{name} has neither prompts nor classes: nothing says what"
                    f" {drawing[0]} is to draw; name a data set that has, or folders of pictures"
                )
            prompts = class_prompts(name, classes)
        return _Set(name, opened, real, mixed(prompts, config.prompts))

    def _extract_real(self, one: _Set) -> None:
        if one.real is None:
            return
        names = {wanted.features for wanted in self.wanted if wanted.metric.needs_real}
        needed = [e for e in self.extractors if names & e.dims.keys()]
        self._extract(one.name, one.real, needed)

    def _extract(self, name: str, pictures: PictureSet, needed: Sequence[Extractor]) -> None:
        rates = extract_set(
            pictures,
            needed,
            self.store,
            batch_size=self.recipe.batch_size,
            log=self.log,
            world=self.world,
        )
        if rates:
            self.rates[name] = rates

    def _drawn(
        self, candidate: Candidate, one: _Set, count: int, seed: int
    ) -> DrawnPictures | PromptedFolder:
        """A candidate's pictures of a data set; those of a generator may still have to be drawn."""
        if candidate.is_folder:
            return PromptedFolder(candidate.config.source, one.prompts, count, self.form)
        generator = self._generator(candidate)
        return DrawnPictures(
            generator, one.prompts, count, seed=seed, folder=self.pictures, form=self.form
        )

    def _generator(self, candidate: Candidate) -> Any:
        """The candidate's generator; the last one stays open."""
        if self._opened is None or self._opened[0] != candidate.title:
            self._opened = None  # two models at once may not fit
            asked = (prompt for one in self.sets for prompt in one.prompts.prompts)
            texts = tuple(dict.fromkeys(prompt.text for prompt in asked))
            self._opened = (candidate.title, candidate.open(texts, self.device))
        return self._opened[1]

    def _evaluate(
        self, candidate: Candidate, one: _Set, count: int, seed: int, selected: bool = False
    ) -> None:
        """Draw, extract and measure a candidate on a data set, as far as that is missing."""
        drawn = self._drawn(candidate, one, count, seed)
        row = template(candidate, one.name, seed, selected)
        on_first(self.world, "the sources", self._refuse_other_source, row)
        sides = Sides(one.name, one.real, drawn, one.prompts.fingerprint)
        if isinstance(drawn, DrawnPictures):
            drawn.draw(self.log, self.world)
        self._extract(f"{candidate.title}, {one.name}", drawn, self.extractors)
        if not selected:
            self._say_what_is_short(one, count)
            self._show(candidate, one, drawn)
        rank, size = (self.world.rank, self.world.size) if self.world else (0, 1)
        failed = ""
        for number, wanted in enumerate(self.wanted):
            if number % size == rank and not failed:
                try:
                    self._measure(wanted, sides, row, selected)
                except UserError as error:  # the others must not wait for this process
                    what = f"{wanted.metric.name} of {wanted.features}"
                    failed = f"{candidate.title} on {one.name}, {what}: {error}"
        told = [[failed, sorted(self.protocols)]]
        if self.world is not None:
            told = exchange(self.world, "the figures", told[0], FOREVER_S)
        for failed, protocols in told:
            if failed:
                raise UserError(failed)
            self.protocols.update(protocols)
        for scorer in self.scorers:
            self._score(scorer, sides, row, by_group=not selected)
        self.features.forget(drawn)

    def _show(self, candidate: Candidate, one: _Set, drawn: PictureSet) -> None:
        """Remember the first pictures for the page."""
        count = min(self.recipe.shown, len(one.prompts), len(drawn))
        if not count or not (isinstance(drawn, DrawnPictures) or drawn.knows_prompts):
            return
        wanted = one.prompts.prompts[:count]
        places: dict[str, int] = {}
        for place, prompt in enumerate(drawn.asked(0, len(drawn))):
            places.setdefault(prompt.id, place)
        if not all(prompt.id in places for prompt in wanted):
            return
        chosen = [places[prompt.id] for prompt in wanted]
        images = [np.asarray(drawn.read(at, at + 1, Stages()).images[0]) for at in chosen]
        if len({image.shape for image in images}) > 1:
            images = [Form(SHOWN_SIDE).array(image) for image in images]
        shown = self.shown.setdefault(one.name, Shown(one.name, [p.text for p in wanted], {}))
        shown.pictures[candidate.title] = np.stack(images)

    def _say_what_is_short(self, one: _Set, count: int) -> None:
        """Warn, once a data set, of figures that have too few pictures to be worth much."""
        if one.name in self.short:
            return
        dims = {name: length for e in self.extractors for name, length in e.dims.items()}
        real = len(one.real) if one.real is not None else 0
        found = [
            str(short)
            for wanted in self.wanted
            for short in shortages(
                wanted.metric, wanted.options, dims[wanted.features], real, count
            )
        ]
        self.short[one.name] = found
        for sentence in found if self._leads else ():
            self.log.warn(f"{one.name}: {sentence}")

    def _refuse_other_source(self, row: Row) -> None:
        """Raise where a row would take the place of another source's."""
        refuse_two_sources([*(r for r in self.table.rows() if r.model == row.model), row])

    def _is_known(self, row: Row, origin: str) -> bool:
        """Whether the table has a row's figures; whatever it says, they are the plan's own."""
        self.protocols.add(row.protocol)
        return self.table.is_complete(row, origin)

    def _measure(self, wanted: Wanted, sides: Sides, row: Row, selected: bool) -> None:
        by_group = self.recipe.by_group and not selected
        origin = self._origin(sides.drawn, wanted.metric.kind)
        found = measured(
            wanted,
            sides,
            self.features,
            row,
            self.recipe.interval,
            by_group=by_group,
            seed=self.recipe.seed,
            known=lambda one: self._is_known(one, origin),
        )
        self._add(found, origin)

    def _origin(self, drawn: PictureSet, kind: str = "") -> str:
        """What figures are made from beside their protocol, as the table notes it.

        Args:
            kind: of a metric, by which intervals are made.
        """
        interval = self.recipe.interval.model_dump(mode="json")
        return digest([drawn.fingerprint, interval, self.recipe.seed, kind])

    def _add(self, found: Iterator[list[Found]], origin: str) -> None:
        for figures in found:
            self.table.add_all(figures, origin)

    def _score(self, scorer: Scorer, sides: Sides, row: Row, by_group: bool) -> None:
        """A scorer's figures: every process scores, rank 0 writes."""
        features = about = None
        if scorer.needs != "picture":
            features = self.features.of(sides.drawn, scorer.needs)
            about = self.features.stated(scorer.needs)
        about = stated(scorer, about)
        key = scores_key(sides.drawn, about)
        score_set(
            sides.drawn,
            scorer,
            key,
            self.store,
            features,
            batch_size=self.recipe.batch_size,
            log=self.log,
            world=self.world,
        )
        origin = self._origin(sides.drawn)

        def add() -> None:
            found = scored(
                scorer,
                about,
                sides,
                self.store.load(key),
                row,
                self.recipe.interval,
                by_group=by_group and self.recipe.by_group,
                seed=self.recipe.seed,
                known=lambda one: self._is_known(one, origin),
            )
            self._add(found, origin)

        on_first(self.world, f"figures of {scorer.name}", add)


def open_scorers(
    recipe: PlanRecipe, extractors: Sequence[Extractor], device: torch.device | str
) -> list[Scorer]:
    """The scorers among the plan's metrics; those that need features share the extractor's."""
    by_name = {name: one for one in extractors for name in one.dims}
    opened = []
    for asked in asked_metrics(recipe):
        if is_scorer(asked):
            needs = SCORERS.get(asked.metric).needs
            opened.append(
                open_scorer(
                    asked.metric,
                    extractor=by_name.get(needs),
                    device=device,
                    options=asked.options,
                )
            )
    return opened


def open_extractors(
    recipe: PlanRecipe, wanted: Sequence[Wanted], device: torch.device | str
) -> Iterator[Extractor]:
    """Every extractor that the metrics need, with all the taps that they need of it.

    Raises:
        UserError: the plan configures one that no metric uses, or weights are missing.
    """
    needed = [one.features for one in wanted]
    needed += [
        SCORERS.get(asked.metric).needs for asked in asked_metrics(recipe) if is_scorer(asked)
    ]
    taps = taps_by_kind(name for name in needed if name != "picture")
    idle = sorted(set(recipe.extractors) - set(taps))
    if idle:
        raise UserError(
            f"extractors.{idle[0]} has no effect: no metric uses it; write METRIC@{idle[0]}"
        )
    for kind, asked in taps.items():
        config = recipe.extractors.get(kind, FeaturesConfig())
        try:
            yield Extractor(
                kind,
                config.weights or FETCHED.get(kind, ""),
                taps=asked,
                dtype=config.dtype,
                compile=config.compile,
                device=device,
                **config.options,
            )
        except UserError as error:
            raise UserError(f"extractors.{kind}: {error}") from None
