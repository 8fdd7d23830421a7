"""A plan of evaluation as a job: its models opened, its page written; called by jobs.py.

The page shows the verdicts in words and pair by pair, every figure with its interval, what the
candidates drew side by side from the same seeds, and a blind vote between them.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from etude.core.distributed import World
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.run import Run
from etude.evaluation.planned.recipe import PlanRecipe
from etude.evaluation.planned.running import Plan, Shown
from etude.evaluation.results import Results, Row
from etude.evaluation.verdict import (
    HELD,
    TOLD_BY_PAIR,
    Verdict,
    one_checkpoint_a_run,
    verdicts,
)
from etude.metrics.intervals import IntervalConfig

from . import generators as _registers  # noqa: F401
from .pictures import as_rgb, enlarge, fitting_scale
from .training import Look

MOST_PAIRS = 200  # rows of the table of pairs, all figures together


def run_plan(
    recipe: PlanRecipe, run: Run, log: Log, world: World, look: Look | None = None
) -> dict[str, Any]:
    """Carry out a plan on every process; the page grows with the table.

    Returns:
        The table's folder, who was evaluated, the verdicts and images per second.
    """
    plan = Plan(recipe, run, log, world)

    def changed() -> None:  # called on rank 0
        if look is not None:
            show_plan(plan, look)

    result = plan.run(changed)
    if world.rank != 0:
        return result
    found, other = plan.results()
    said = in_words(judged(found, recipe.interval))
    for name, count in other.items():
        log.info(f"{name}: {other_protocols(count)}")
    for line in said:
        log.info(line)
    log.table("figures", *figures_table(_reported(found)))
    return result | {"verdicts": said, "rows": len(found.rows)}


def show_plan(plan: Plan, look: Look) -> None:
    """Put what the table holds so far on the page."""
    page, order = look.page, look.order
    results, other = plan.results()
    reported = _reported(results)
    if reported.rows:
        found = judged(results, plan.recipe.interval)
        page.note(look.id("verdict"), "\n\n".join(in_words(found)), "In words", order=order)
        columns, rows, note = pairs_table(found)
        if rows:
            page.table(look.id("pairs"), "All pairs", columns, rows, note, order=order + 0.5)
    words = words_of_ids(plan.recipe.data_sets)
    for number, name in enumerate(plan.recipe.data_sets):
        of_set = reported.where(data_set=name)
        place = order + 1 + 0.1 * number
        if of_set.rows:
            columns, rows = figures_table(of_set)
            note = "Brackets are intervals of the figure at this number of pictures."
            note += "".join(f" {sentence}." for sentence in plan.short.get(name, ()))
            note += f" {other_protocols(other[name])}" if name in other else ""
            page.table(look.id(f"figures-{words[name]}"), name, columns, rows, note, order=place)
        if name in plan.shown:
            _show_pictures(plan.shown[name], words[name], look, place + 0.05)
    page.write()


def judged(results: Results, config: IntervalConfig) -> list[Verdict | UserError]:
    """Verdicts on every figure of all pictures that two models or more have, or why not."""
    figures: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.rows:
        if not row.group and not row.selected:
            figures.setdefault((row.data_set, row.metric, row.features), []).append(row)
    found: list[Verdict | UserError] = []
    for (data_set, metric, features), rows in figures.items():
        if len({(row.model, row.checkpoint) for row in one_checkpoint_a_run(rows)[0]}) < 2:
            continue
        try:
            found += verdicts(results, metric, data_set=data_set, features=features, config=config)
        except UserError as error:
            found.append(error)
    return found


def other_protocols(count: int) -> str:
    """What is said of rows of the table that do not compare with the plan's."""
    rows = "row" if count == 1 else "rows"
    return f"The table has {count:,} {rows} of other protocols too, which are not compared here."


def in_words(found: list[Verdict | UserError]) -> list[str]:
    """What the table says, a paragraph a verdict, then how sure their comparisons are."""
    said = [f"{one}." if isinstance(one, UserError) else str(one) for one in found]
    several = any(isinstance(one, Verdict) and len(one.differences) > 1 for one in found)
    return [*said, HELD] if several else said


def pairs_table(found: list[Verdict | UserError]) -> tuple[list[str], list[list[object]], str]:
    """Columns, rows and a note: the pairs of verdicts whose words do not tell every pair.

    At most `MOST_PAIRS` rows: of every verdict equally many, those of its best models first.
    """
    long = [v for v in found if isinstance(v, Verdict) and len(v.ranking) > TOLD_BY_PAIR]
    share = -(-MOST_PAIRS // max(len(long), 1))
    rows: list[list[object]] = []
    for verdict in long:
        alike = set(verdict.alike)
        what = [
            verdict.metric + (f" @{verdict.features}" if verdict.features else ""),
            verdict.data_set,
            verdict.at or "-",
        ]
        for pair, one in itertools.islice(verdict.differences.items(), share):
            numbers = one.value, one.low, one.high, one.adjusted_p_value
            shown = ["-" if number is None else number for number in numbers]
            rows.append([*what, *pair, *shown, "no" if pair in alike else "yes"])
    rows = rows[:MOST_PAIRS]
    left_out = sum(len(verdict.differences) for verdict in long) - len(rows)
    note = (
        "This minus that. The pairs of one figure, data set and guidance are held against each "
        "other: intervals hold together, p-values are Holm's."
    )
    if left_out:
        note += (
            f" At most {MOST_PAIRS} pairs are shown, those of the best models first: {left_out:,} "
            "are left out. The results table has the figures of all."
        )
    columns = ["figure", "data set", "at", "this", "that", "difference", "low", "high"]
    return [*columns, "adjusted p", "decided"], rows, note


def figures_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a candidate a row, a figure a column, all pictures together.

    Pictures of several seeds, where plans share a table, have rows of their own.
    """
    rows = [row for row in results.rows if not row.group]
    figures = list(dict.fromkeys(_figure(row) for row in rows))
    several = len({row.seed for row in rows}) > 1
    found: dict[tuple, dict[str, str]] = {}
    for row in rows:
        who = [_model(row), _checkpoint(row), _scale(row), row.data_set, f"{row.n_generated:,}"]
        who += [str(row.seed)] if several else []
        found.setdefault(tuple(who), {})[_figure(row)] = _shown_value(row)
    columns = ["model", "checkpoint", "guidance", "data set", "pictures"]
    columns += ["seed"] if several else []
    return [*columns, *figures], [
        [*who, *(values.get(figure, "") for figure in figures)] for who, values in found.items()
    ]


def _reported(results: Results) -> Results:
    return results.where(selected=False)


def _show_pictures(shown: Shown, name: str, look: Look, order: float) -> None:
    """A blind vote, then the same pictures with their makers: rows of prompts, columns of these.

    Args:
        name: of the data set, as part of a section's identifier.
    """
    titles = list(shown.pictures)
    cells = _enlarged(list(shown.pictures.values()))
    grid = np.concatenate([np.concatenate(list(column), axis=0) for column in cells], axis=1)
    caption = "Columns: " + "; ".join(titles) + ". Rows: " + "; ".join(shown.prompts)
    title = f"{shown.data_set}: the same prompts and seeds"
    if len(titles) > 1:
        # First, so that the page folds the captioned pictures behind it (page_vote.py).
        look.page.vote(
            look.id(f"vote-{name}"),
            f"{shown.data_set}: blind vote",
            shown.prompts,
            dict(zip(titles, cells, strict=True)),
            order=order,
        )
    order += 0.01
    look.page.grid(look.id(f"pictures-{name}"), title, grid, caption, "side by side", order=order)


def _enlarged(of_all: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures (n, H, W, C) of each candidate as (n, side, side, 3): small ones are enlarged by a
    whole factor, then all to the size of the largest.
    """
    found = []
    for images in map(as_rgb, of_all):
        scale = fitting_scale(images.shape[2])
        found.append(np.stack([enlarge(image, scale) for image in images]))
    side = max(max(images.shape[1:3]) for images in found)
    return [
        np.stack([np.asarray(Image.fromarray(one).resize((side, side))) for one in images])
        for images in found
    ]


def _figure(row: Row) -> str:
    return f"{row.metric} ({row.better} is better)" + (f" @{row.features}" if row.features else "")


def _model(row: Row) -> str:
    """The model, and which of its training runs."""
    seed = row.training_seed
    return row.model if seed is None else f"{row.model}, training seed {seed}"


def _checkpoint(row: Row) -> str:
    return "" if row.images_seen is None else f"{row.images_seen:,} images"


def _scale(row: Row) -> str:
    return "" if row.guidance is None else f"{row.guidance:g}"


def _shown_value(row: Row) -> str:
    if row.low is None:
        return f"{row.value:.4g}"
    return f"{row.value:.4g} [{row.low:.4g}, {row.high:.4g}]"


def words_of_ids(names: Iterable[str]) -> dict[str, str]:
    """Names as parts of sections' identifiers, all different; later names change no earlier one."""
    found: dict[str, str] = {}
    for number, name in enumerate(names, start=1):
        plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())
        word = "-".join(filter(None, plain.split("-"))) or "set"
        while word in found.values():
            word = f"{word}-{number}"
        found[name] = word
    return found
