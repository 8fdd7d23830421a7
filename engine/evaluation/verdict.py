"""What rows of results say about several models, in plain words; called by plans and the page.

One figure on one data set at a time. Which model is best, which cannot be told apart from which,
and how many more pictures would tell: every pair is compared (metrics/comparing.py), all pairs of a
verdict are held against each other by Holm. The words tell every pair of up to three models, and
of more only the best against its rivals; the differences have all. Guidance moves a figure as much
as training does, so models are compared at every scale that all of them have, and each at its own
best one.

Rows whose pictures chose something never count; where a plan has such rows, they choose the best
guidance, and other pictures give the figure. Otherwise the figures themselves choose, which is
said: the best of several is too good by chance.

Training runs differ by chance too; where both models have several, that is counted (sides.py).
Where one has one run, the verdict says that this noise is not included.

A guidance that the same figures chose is the best of several tries, so the p-values and levels of
such comparisons are corrected by their number (Bonferroni).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from etude.core.errors import UserError
from etude.metrics.comparing import (
    POWER,
    level_of_each,
    needed,
    with_holm,
)
from etude.metrics.estimates import Estimate
from etude.metrics.intervals import Interval, IntervalConfig

from .results import Results, Row
from .sides import Side, compare_sides, scatter_of_runs

OWN_BEST = "each model's own best guidance"
TOLD_BY_PAIR = 3  # models, up to which the words tell every pair
NAMED = 3  # of a longer list; the others are a number
SCATTER = "runs are assumed to scatter equally in every model"
HELD = (
    "The comparisons of one paragraph are held against each other: intervals hold together, "
    "p-values are Holm's. Different paragraphs are not held against each other."
)
ASSUMED = (
    f"So many pictures tell apart with probability {POWER:g}, if the true difference is the one "
    "measured and the error falls with the root of their number."
)


@dataclass(frozen=True)
class Verdict:
    """What the rows say about one figure at one choice of guidance.

    Attributes:
        figure: the metric, "recall", or "recall@dinov2" where there is one of other features too.
        at: the guidance that was compared, in words.
        ranking: titles of the models, best value first.
        differences: (better, worse) -> better minus worse by value, with Holm's p-value.
        alike: pairs that cannot be told apart at the level asked for.
        wanted: pair that is alike -> pictures a side that would tell them apart with probability
            0.8; None where that cannot be said.
        sentences: what matters of it in words, however many models there are.
    """

    metric: str
    features: str
    figure: str
    data_set: str
    group: str
    at: str
    ranking: tuple[str, ...]
    differences: dict[tuple[str, str], Interval]
    alike: tuple[tuple[str, str], ...]
    wanted: dict[tuple[str, str], int | None]
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.sentences)


def verdicts(
    results: Results,
    metric: str,
    *,
    data_set: str,
    features: str = "",
    group: str = "",
    config: IntervalConfig | None = None,
) -> list[Verdict]:
    """Verdicts on one figure: at every guidance that all models share, then at each one's best.

    Args:
        features: which, where the figure is there for several; "" otherwise.

    Raises:
        UserError: fewer than two models have the figure, or the rows have different protocols,
            features or numbers of pictures.
    """
    config = config or IntervalConfig()
    found = results.where(metric=metric, data_set=data_set, group=group).rows
    rows, notes = one_checkpoint_a_run([r for r in found if not features or r.features == features])
    counted = [row for row in rows if not row.selected and math.isfinite(row.value)]
    selecting = [row for row in rows if row.selected and math.isfinite(row.value)]
    odd = [row for row in rows if not row.selected and not math.isfinite(row.value)]
    if odd:
        titles = list(dict.fromkeys(map(_title, odd)))
        notes.append(f"Left out: {_listed(titles)}, whose {metric} is not a number.")
    refuse_unlike(counted)
    models = sorted({_model(row) for row in counted})
    if len(models) < 2:
        why = "".join(f" ({note.removesuffix('.')})" for note in notes)
        raise UserError(
            f"{metric} on {data_set} is there for {len(models)} model: a verdict needs two; "
            f"add models to the plan, or name another figure{why}"
        )
    several = len({row.features for row in results.rows if row.metric == metric}) > 1
    figure = f"{metric}@{counted[0].features}" if several else metric
    judge = partial(_verdict, results, figure, config)
    scales = {model: {r.guidance for r in counted if _model(r) == model} for model in models}
    common = sorted(set.intersection(*scales.values()), key=_order_of_guidance)
    verdicts_found = []
    for scale in common:
        chosen = [row for row in counted if row.guidance == scale]
        words = "" if scale is None else f"guidance {scale:g}"
        verdicts_found.append(judge(chosen, words, notes))
    if any(len(of) > 1 for of in scales.values()):
        best, tries, said = _at_own_best(counted, selecting, models)
        verdicts_found.append(judge(best, OWN_BEST, [*said, *notes], tries))
    if not verdicts_found:
        said = "The models share no guidance, so this compares guidance as well."
        verdicts_found.append(judge(counted, "each model's guidance", [said, *notes]))
    return verdicts_found


def refuse_unlike(rows: Iterable[Row]) -> None:
    """`UserError` naming what rows of one figure differ in that makes them incomparable."""
    rows = list(rows)
    for what, name in (
        ("features", "features"),
        ("numbers of generated pictures", "n_generated"),
        ("numbers of real pictures", "n_real"),
        ("protocols", "protocol"),
        ("directions of what is better", "better"),
    ):
        found = {}
        for row in rows:
            found.setdefault(getattr(row, name), row)
        if len(found) > 1:
            shown = "; ".join(_first([f"{value} ({_title(row)})" for value, row in found.items()]))
            files = " and ".join(f"{value}.json" for value in list(found)[:2])
            where = (
                f" (the table's protocols/ {files} say what differs)" if what == "protocols" else ""
            )
            raise UserError(
                f"rows of {rows[0].metric} on {rows[0].data_set} have different {what} and cannot "
                f"be compared: {shown}; evaluate all models the same way{where}, or keep one kind "
                f"with results.where({name}={next(iter(found))!r})"
            )


def _verdict(
    results: Results,
    figure: str,
    config: IntervalConfig,
    rows: Sequence[Row],
    at: str,
    notes: Sequence[str],
    tries: Mapping[tuple[str, str], int] | None = None,
) -> Verdict:
    """A verdict on these rows.

    Args:
        tries: model -> guidance scales of which its figures chose the best; 1 where it is left out.
    """
    sides = _sides(results, rows)
    sign = 1.0 if rows[0].better == "lower" else -1.0
    ranked = sorted(sides, key=lambda side: sign * side.value)
    pairs = list(itertools.combinations(ranked, 2))
    scatter = scatter_of_runs(sides)
    apart, levels = {}, {}
    for b, a in pairs:
        # A false winner has to be the best of its own tries only, so the larger number is enough.
        tried = max((tries or {}).get(side.model, 1) for side in (b, a))
        pair = b.title, a.title
        levels[pair] = level_of_each(config.level, len(pairs) * tried)
        one = compare_sides(b, a, levels[pair], scatter)
        p_value = None if one.p_value is None else min(tried * one.p_value, 1.0)
        apart[pair] = replace(one, p_value=p_value)
    found = with_holm(apart)
    alike = tuple(
        pair
        for pair, one in found.items()
        if one.adjusted_p_value is None or one.adjusted_p_value > 1.0 - config.level
    )
    several = {side.title for side in sides if len(side.runs) > 1}
    # Where training runs count on both sides, more pictures do not tell models apart.
    by_pictures = [pair for pair in alike if not several.issuperset(pair)]
    wanted = {pair: _wanted(found[pair], ranked[0], levels[pair]) for pair in by_pictures}
    verdict = Verdict(
        rows[0].metric,
        rows[0].features,
        figure,
        rows[0].data_set,
        rows[0].group,
        at,
        tuple(side.title for side in ranked),
        found,
        alike,
        wanted,
        (),
    )
    return replace(verdict, sentences=tuple(_sentences(verdict, ranked, notes)))


def _sides(results: Results, rows: Sequence[Row]) -> list[Side]:
    found: dict[tuple[str, str], dict[int | None, list[tuple[Row, Estimate]]]] = {}
    for row in rows:
        runs = found.setdefault(_model(row), {})
        runs.setdefault(row.training_seed, []).append((row, results.estimate(row)))
    titles = _titles(list(found))
    return [
        Side(titles[who], who, {seed: tuple(run) for seed, run in runs.items()})
        for who, runs in found.items()
    ]


def _titles(models: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What to call each model and checkpoint; a model without others is called by its name."""
    names = [model for model, _ in models]
    return {
        (model, checkpoint): (
            model if names.count(model) == 1 or not checkpoint else f"{model} at {checkpoint}"
        )
        for model, checkpoint in models
    }


def _at_own_best(
    counted: Sequence[Row], selecting: Sequence[Row], models: Sequence[tuple[str, str]]
) -> tuple[list[Row], dict[tuple[str, str], int], list[str]]:
    """Each model's rows at the guidance where it does best; the scales tried by those whose own
    figures chose; and what to say about the choice.
    """
    rows, found, titles, tries = [], [], _titles(models), {}
    for model in models:
        own = [row for row in counted if _model(row) == model]
        judges = [row for row in selecting if _model(row) == model]
        offered = {row.guidance for row in own}
        judges = [row for row in judges if row.guidance in offered]
        # Selecting rows that know one scale only have chosen something else.
        itself = len({row.guidance for row in judges}) < 2
        judges = own if itself else judges
        sign = 1.0 if own[0].better == "lower" else -1.0
        best = min(
            {row.guidance for row in judges},
            key=lambda scale: sign * np.mean([r.value for r in judges if r.guidance == scale]),
        )
        at_best = [row for row in own if row.guidance == best]
        rows += at_best
        worth = sign * np.mean([row.value for row in at_best])
        found.append((worth, titles[model], best, itself and len(offered) > 1))
        tries[model] = len(offered) if itself else 1
    if len(found) > TOLD_BY_PAIR:
        found.sort(key=lambda one: one[0])  # the best are named
    scales = [f"{name} {'none' if best is None else f'{best:g}'}" for _, name, best, _ in found]
    notes = [f"Guidance: {', '.join(_first(scales))}."]
    chosen_by_itself = [name for _, name, _, itself in found if itself]
    if chosen_by_itself:
        every = len(chosen_by_itself) == len(found)
        which = "Each" if every else f"The guidance of {_listed(chosen_by_itself)}"
        notes.append(
            f"{which} was chosen by these same figures, "
            "which makes them look better than fresh pictures would; p-values and intervals are "
            "corrected for the scales tried."
        )
    return rows, tries, notes


def _wanted(found: Interval, side: Side, level: float) -> int | None:
    if found.standard_error is None:
        return None
    return needed(found.value, found.standard_error, side.pictures, level)


def _sentences(verdict: Verdict, ranked: Sequence[Side], notes: Sequence[str]) -> Iterable[str]:
    best, where = ranked[0], f"{verdict.figure} on {verdict.data_set}"
    where += f", {verdict.group}" if verdict.group else ""
    where += f", at {verdict.at}" if verdict.at else ""
    first = [side.title for side in ranked if side.value == best.value]
    pairs = [pair for pair in verdict.alike if pair[0] == best.title]
    rivals = [pair[1] for pair in pairs if pair[1] not in first]
    if len(first) == len(ranked):
        yield f"{where}: {_listed(first)} have the same value ({best.value:.4g})."
    elif len(first) == 1 and not rivals:
        yield f"{where}: {best.title} is best ({best.value:.4g})."
    else:
        have = "has the best value" if len(first) == 1 else "share the best value"
        apart = f", but cannot be told apart from {_listed(rivals)}" if rivals else ""
        yield f"{where}: {_listed(first)} {have} ({best.value:.4g}){apart}."
    yield from notes
    yield from _pairs(verdict, best) if len(ranked) <= TOLD_BY_PAIR else _rivals(verdict, best)
    runs = [len(side.runs) for side in ranked]
    if min(runs) > 1:
        yield f"Training-run noise is included: {min(runs)} runs each or more; {SCATTER}."
    elif max(runs) == 1:
        yield "Training-run noise not included: one run each."
    else:
        single = [side.title for side in ranked if len(side.runs) == 1]
        have, its = ("have", "their") if len(single) > 1 else ("has", "its")
        others = f"; in the others it is, and {SCATTER}" if len(runs) > len(single) + 1 else ""
        yield (
            f"{_listed(single)} {have} one training run, so how runs differ is not included in "
            f"{its} comparisons{others}."
        )


def _pairs(verdict: Verdict, best: Side) -> Iterable[str]:
    """A sentence for every pair."""
    for pair, one in verdict.differences.items():
        if pair in verdict.alike:
            yield _alike(verdict, pair, one, best.pictures)
        else:
            yield (
                f"{pair[0]} is better than {pair[1]}: {pair[0]} minus {pair[1]} is {one}, "
                f"p = {one.adjusted_p_value:.2g}."
            )
    if any(verdict.wanted.values()):
        yield ASSUMED


def _rivals(verdict: Verdict, best: Side) -> Iterable[str]:
    """The best against all others: counts, and the nearest by name."""
    title, alike = best.title, set(verdict.alike)
    of_best = {pair: one for pair, one in verdict.differences.items() if pair[0] == title}
    worse = [pair for pair in of_best if pair not in alike]
    near = [pair for pair in of_best if pair in alike]
    if worse:
        one = of_best[worse[0]]
        yield (
            f"{title} is better than {len(worse)} of {len(of_best)} others, the nearest first: "
            f"{_listed([pair[1] for pair in worse])}. Its value minus that of the first of them "
            f"is {one}, p = {one.adjusted_p_value:.2g}."
        )
    counts = {pair[1]: verdict.wanted.get(pair) for pair in near[:NAMED]}
    told = [f"from {name} {_round(count):,}" for name, count in counts.items() if count]
    if told:
        yield (
            f"About so many pictures of each side, in place of {best.pictures:,}, would tell "
            f"{title} apart: {_listed(told)}."
        )
        yield ASSUMED
    elif near:
        yield _alike(verdict, near[0], of_best[near[0]], best.pictures)


def _alike(verdict: Verdict, pair: tuple[str, str], one: Interval, pictures: int) -> str:
    if one.p_value is None:
        return f"{pair[0]} and {pair[1]} have no interval, so nothing is said of their order."
    if one.value == 0.0 and one.standard_error == 0.0:
        return f"{pair[0]} and {pair[1]} have the same value on every half of the pictures."
    said = (
        f"{pair[0]} and {pair[1]} cannot be told apart (the first minus the second is {one}, "
        f"p = {one.adjusted_p_value:.2g})"
    )
    if pair not in verdict.wanted:
        return f"{said}; more training runs would narrow this, more pictures only in part."
    count = verdict.wanted[pair]
    if count is None:
        return f"{said}; no number of pictures can be given."
    more = _round(max(count - pictures, 1))
    return (
        f"{said}; about {more:,} more pictures of each side, {_round(pictures + more):,} in place "
        f"of {pictures:,}, would tell them apart."
    )


def one_checkpoint_a_run(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows of models whose training runs have one checkpoint each, as of one model without any.

    The last checkpoints of two runs may have seen different numbers of pictures, and their runs
    still count as one model; selecting rows, of all checkpoints of a screen, do not. Returns what
    to say of it too.
    """
    seen: dict[str, dict[int | None, set[str]]] = {}
    for row in rows:
        if row.selected:
            continue
        runs = seen.setdefault(row.model, {})
        runs.setdefault(row.training_seed, set()).add(row.checkpoint)
    notes, pooled = [], set()
    for model, runs in seen.items():
        each = sorted(set.union(*runs.values()))
        if len(each) > 1 and all(len(checkpoints) == 1 for checkpoints in runs.values()):
            pooled.add(model)
            notes.append(
                f"The training runs of {model} are at different checkpoints: {_listed(each)}."
            )
    return [replace(r, checkpoint="") if r.model in pooled else r for r in rows], notes


def _model(row: Row) -> tuple[str, str]:
    return row.model, row.checkpoint


def _title(row: Row) -> str:
    guidance = "" if row.guidance is None else f" guidance {row.guidance:g}"
    return f"{row.model}{' ' + row.checkpoint if row.checkpoint else ''}{guidance}"


def _order_of_guidance(scale: float | None) -> float:
    return -math.inf if scale is None else scale


def _round(count: int) -> int:
    """Two digits, upwards."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit


def _first(names: Sequence[str]) -> list[str]:
    """The names; of a long list the first and how many there are beside."""
    if len(names) <= NAMED:
        return list(names)
    return [*names[:NAMED], f"{len(names) - NAMED} more"]


def _listed(names: Sequence[str]) -> str:
    names = _first(names)
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
