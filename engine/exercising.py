"""From a table of results to the page of an exercise; called by `etude evaluate --exercise`.

The folder of an answer holds `page.html`, `result.json` with everything that was computed, every
table as CSV and every drawing as SVG. Asking again replaces them.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etude.core.errors import UserError
from etude.core.files import read_json, write_json_atomic, write_text_atomic
from etude.core.recipe_tree import from_plain, lay, parse_override, to_plain
from etude.evaluation.evalgim_tables import is_evalgim_table, read_evalgim_table
from etude.evaluation.exercises import EXERCISES, Choice, Finding, Table, answer
from etude.evaluation.results import Results
from etude.evaluation.table import read_table

from .page import Page


def run_exercise(
    name: str, source: str | Path, overrides: Sequence[str] = (), folder: str | Path | None = None
) -> Path:
    """Ask a table one question; the page that answers.

    Args:
        name: "trade-offs", "groups", "ranking", "prompt-types", or a name that somebody registered.
        source: a plan's run or table, its CSV or Parquet file alone, or a CSV that EvalGIM wrote.
        overrides: the exercise's options, as `metrics=[FID,recall]`; and `better.COLUMN=higher` or
            `lower` for columns of EvalGIM's CSV that somebody added.
        folder: where the answer goes; by default `exercises/<name>` beside the table.

    Raises:
        UserError: the table, the name or an option does not fit.
    """
    name = name.replace("_", "-")
    EXERCISES.get(name)  # before anything is read
    tree = from_plain({}, f"the exercise {name}")
    for text in overrides:
        tree = lay(tree, parse_override(text))
    options = to_plain(tree)
    better = options.pop("better", {})
    if not isinstance(better, Mapping):
        raise UserError(
            "the option better names no column; write better.COLUMN=higher, or better.COLUMN=lower"
        )
    results, beside, notes = _read(Path(source), better)
    folder = Path(folder) if folder is not None else beside / "exercises" / name
    return show_exercise(name, results, options, folder, notes, str(source))


def show_exercise(
    name: str,
    results: Results,
    options: Choice | Mapping[str, Any] | None,
    folder: str | Path,
    notes: Sequence[str] = (),
    source: str = "",
) -> Path:
    """Run an exercise on results and write its page, `result.json`, tables and drawings.

    Args:
        notes: sentences about the results that stand below what was found.
        source: where the results were read from.

    Returns:
        The path of `page.html`.

    Raises:
        UserError: the name or an option does not fit, or the results cannot answer.
    """
    finding, folder = answer(name, results, options), Path(folder)
    sentences = [*finding.sentences, *notes]
    files = {f"{part}.csv": _csv(table) for part, table in finding.tables.items()}
    files |= {f"{part}.svg": plot.svg for part, plot in finding.plots.items()}
    _clear(folder)
    about = {"exercise": finding.exercise, "title": finding.title, "sentences": sentences}
    about |= {"source": source, "options": finding.options, "protocols": list(finding.protocols)}
    about["newest_figure"] = max((row.date for row in results.rows), default="")
    write_json_atomic(folder / "result.json", about | {"files": list(files)} | finding.data)
    for file, text in files.items():
        write_text_atomic(folder / file, text)
    return _page(finding, about, folder)


def _page(finding: Finding, about: Mapping[str, Any], folder: Path) -> Path:
    page = Page(folder, finding.title, EXERCISES.get(finding.exercise).about)
    page.state("finished")
    page.note("found", "\n\n".join(about["sentences"]), "What was found", order=1)
    page.note("asked", _asked(about), "What was asked", order=2)
    for place, (part, plot) in enumerate(finding.plots.items()):
        page.drawing(f"plot-{part}", plot.title, plot.svg, plot.note, order=10 + place)
    first = 10 + len(finding.plots)
    for place, (part, table) in enumerate(finding.tables.items()):
        rows = [["" if value is None else value for value in row] for row in table.rows]
        page.table(
            f"table-{part}", table.title, table.columns, rows, table.note, order=first + place
        )
    return page.write()


def _asked(about: Mapping[str, Any]) -> str:
    """The source, the options that are not as they are by default, and the protocols, in a line."""
    default = EXERCISES.get(about["exercise"]).options().model_dump(mode="json")
    chosen = {name: v for name, v in about["options"].items() if v != default.get(name)}
    spelled = [f"{name}={json.dumps(value)}" for name, value in chosen.items()]
    parts = [f"Of {about['source']}"] if about["source"] else []
    parts.append(f"options: {', '.join(spelled) or 'none'}")
    parts.append(f"protocols: {', '.join(about['protocols']) or 'not stated'}")
    if about["newest_figure"]:
        parts.append(f"newest figure: {about['newest_figure']}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _csv(table: Table) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows:
        writer.writerow(["" if value is None else _plain(value) for value in row])
    return stream.getvalue()


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's, whose text reads back equal."""
    return value.item() if hasattr(value, "item") else value


def _read(source: Path, better: Mapping[str, str]) -> tuple[Results, Path, list[str]]:
    """The results, the folder beside which the answer goes, and what the table does not say."""
    if is_evalgim_table(source):
        table = read_evalgim_table(source, better)
        notes = [
            "The table is EvalGIM's, which keeps no interval and no number of pictures: nothing is "
            "known of chance, nor of whether figures compare."
        ]
        if table.unknown:
            notes.append(
                f"Not read, since nothing is known of them: {', '.join(table.unknown)} (type "
                f"better.{table.unknown[0]}=higher, or lower, to have one)."
            )
        return table.results, source.parent, notes
    if better:
        raise UserError(
            f"better.{next(iter(better))} is for EvalGIM's CSV; {source} says it itself"
        )
    results = read_table(source)
    places = (source.parent if source.is_file() else source, Path("runs") / source)
    return results, next((place for place in places if place.is_dir()), source), []


def _clear(folder: Path) -> None:
    """Remove what an earlier answer wrote, so that nothing of it stays on the page."""
    path = folder / "result.json"
    if not path.exists():
        return
    old = read_json(path)
    if "exercise" not in old:
        raise UserError(f"{folder} holds the result of something else; name another folder")
    for name in old["files"]:
        (folder / name).unlink(missing_ok=True)
    for section in (folder / "page").glob("*.json"):
        section.unlink()
