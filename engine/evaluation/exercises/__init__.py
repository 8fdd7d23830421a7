"""Exercises: questions about a table of results, each answered in words, tables and drawings.

An exercise takes `Results` (results.py) and its options and returns a `Finding`, of which
exercising.py makes a page. A new one is one file in this folder, or anywhere, with a function under
`@exercise(...)`. What all of them share: rows.py chooses rows and mixtures.py refuses those that do
not compare, names.py says what they are called, joint.py computes probabilities, orders.py compares
models pair by pair, drawing.py draws.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.recipe_faults import explain
from etude.core.recipe_tree import from_plain, to_plain
from etude.core.registry import Registry

from ..results import Results


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_as_text)]  # 2560 is a name too, as plans write checkpoints


class Choice(Config):
    """What an exercise looks at; the options that all exercises share."""

    metrics: tuple[str, ...] = option((), "figures, such as FID or precision@dinov2; none: all")
    data_sets: tuple[Name, ...] = option((), "data sets by name; none: all")
    models: tuple[Name, ...] = option((), "models by name; none: all")
    checkpoints: tuple[Name, ...] = option((), "checkpoints by name; none: all")
    guidance: tuple[float, ...] = option((), "guidance scales; none: all")
    n_generated: int = option(
        0, "only figures of so many generated pictures; 0: all", unit="pictures", ge=0
    )
    protocols: tuple[Name, ...] = option(
        (),
        "only figures of these protocols, by their fingerprints or beginnings of them; none: all",
    )
    level: float = option(0.95, "probability of intervals and of decisions", gt=0.5, lt=1.0)


@dataclass(frozen=True)
class Plot:
    """A drawing: SVG text that asks nobody for anything, and what it shows in words."""

    title: str
    svg: str
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values under named columns; None for what is not known."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """The answer of an exercise.

    Attributes:
        sentences: what was found, the most important first, then what was left out and why.
        data: plain values for result.json.
        tables, plots: by name; names are lower-case words joined by hyphens.
        protocols: of the figures it rests on, by fingerprint.
        options: what was asked, every option of the exercise as a plain value; `answer` fills it.
    """

    exercise: str
    title: str
    sentences: tuple[str, ...]
    data: dict[str, Any]
    tables: dict[str, Table] = field(default_factory=dict)
    plots: dict[str, Plot] = field(default_factory=dict)
    protocols: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exercise:
    """A function from results to a finding.

    Attributes:
        about: the question it answers, one sentence.
        options: the section of options that it takes.
    """

    name: str
    run: Callable[[Results, Any], Finding]
    about: str
    options: type[Choice] = Choice


EXERCISES: Registry[Exercise] = Registry(
    "exercise", "etude.evaluation.exercises", "etude.exercises"
)


def exercise(name: str, **about: Any) -> Callable:
    """The decorator of an exercise's function; `about` are the fields of `Exercise`."""

    def register(run: Callable) -> Callable:
        EXERCISES.add(name, Exercise(name, run, **about))
        return run

    return register


def answer(
    name: str, results: Results, options: Choice | Mapping[str, Any] | None = None
) -> Finding:
    """The finding of the exercise `name`.

    Args:
        options: the exercise's own options, or their fields; by default all rows of the table.

    Raises:
        UserError: there is no such exercise, an option does not fit, or the table cannot answer.
    """
    found = EXERCISES.get(name)
    if not isinstance(options, found.options):
        given = options.model_dump(exclude_unset=True) if isinstance(options, Config) else options
        options = _options(found, dict(given or {}))
    if not results.rows:
        raise UserError(f"{name}: the table has no rows; evaluate something first")
    return replace(found.run(results, options), options=options.model_dump(mode="json"))


def _options(found: Exercise, given: dict[str, Any]) -> Choice:
    tree = from_plain(given, f"the exercise {found.name}")
    try:
        return found.options.model_validate_json(json.dumps(to_plain(tree)), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, tree, found.options)) from None
