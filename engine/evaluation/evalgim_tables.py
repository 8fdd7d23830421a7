"""Tables of EvalGIM read as results, so that the exercises work on them; called by exercising.py.

EvalGIM (arXiv 2412.10604) writes one wide row for each model, data set and guidance scale: columns
model_id, dataset, cfg_scale, output_dir, then one column a metric, and `<metric>_<group>` for the
groups of a data set. It keeps no interval, no number of pictures and no protocol; what is read here
says so, and exercises then speak about values alone.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from etude.core.errors import UserError

from .results import Results, Row

# Column: (figure, features, better). Two FID columns differ in the network's weights.
METRICS = {
    "fid_torchmetrics": ("FID", "inception", "lower"),
    "fid_torcheval": ("FID", "inception-torchvision", "lower"),
    "fid": ("FID", "inception", "lower"),
    "precision": ("precision", "inception", "higher"),
    "recall": ("recall", "inception", "higher"),
    "density": ("density", "inception", "higher"),
    "coverage": ("coverage", "inception", "higher"),
    "clipscore": ("CLIPScore", "clip", "higher"),
    "dsg": ("DSG", "", "higher"),
    "vqascore": ("VQAScore", "", "higher"),
}
MODEL, DATA_SET, GUIDANCE = "model_id", "dataset", "cfg_scale"
# Ends of columns that say how a figure scatters, or of how many pictures it is.
SPREADS = ("_std", "_err", "_stderr", "_var", "_ci", "_low", "_high", "_mean", "_n")
IGNORED = ("output_dir", "")  # a path, and the index column of pandas
PROTOCOL = "EvalGIM, not stated"


@dataclass(frozen=True)
class EvalgimTable:
    """What a table holds.

    Attributes:
        unknown: columns that are neither metrics nor groups of one, spreads of a figure among them;
            nothing of them is in the results.
    """

    results: Results
    unknown: tuple[str, ...]


def is_evalgim_table(path: str | Path) -> bool:
    """Whether a file is a CSV with EvalGIM's column of models."""
    path = Path(path)
    return path.suffix.lower() == ".csv" and path.is_file() and MODEL in _read(path)[0]


def read_evalgim_table(path: str | Path, better: Mapping[str, str] | None = None) -> EvalgimTable:
    """The rows of a table; empty cells give none, and `nan` gives a figure that is not a number.

    Args:
        better: "lower" or "higher" for metric columns of your own, by column.

    Raises:
        UserError: the file has no column of models, no known metric, or a cell that is no number.
    """
    path = Path(path)
    columns, lines = _read(path)
    if MODEL not in columns:
        raise UserError(f"{path} has no column {MODEL}; name a table that EvalGIM wrote")
    known = dict(METRICS)
    for name, side in (better or {}).items():
        if side not in ("lower", "higher") or name not in columns:
            raise UserError(
                f"{path}: {name}={side} names no column and direction; write COLUMN=lower or "
                "COLUMN=higher"
            )
        known[name] = (name, "", side)
    figures, unknown = {}, []
    for column in columns:
        if column in (MODEL, DATA_SET, GUIDANCE, *IGNORED):
            continue
        found = _figure(column, known)
        if found is None:
            unknown.append(column)
        else:
            figures[column] = found
    if not figures:
        raise UserError(
            f"{path} has no column of a known metric ({', '.join(METRICS)}); "
            f"it has {', '.join(columns)}"
        )
    rows = []
    for where, line in lines:
        rows += _rows(line, figures, where)
    return EvalgimTable(Results(tuple(rows)), tuple(unknown))


def _read(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The columns, and where each line is with its cells by column."""
    lines = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, skipinitialspace=True)
            head = [name.strip() for name in next(reader, [])]
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if not cells:
                    continue  # an empty line
                # Without its column of models it is no table of EvalGIM, and not read as one.
                if MODEL in head and len(cells) != len(head):
                    raise UserError(
                        f"{where}: the line has {len(cells)} cells and the head {len(head)}; write "
                        "text that holds a comma in quotes"
                    )
                lines.append((where, dict(zip(head, cells, strict=False))))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a table that EvalGIM wrote") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); write it again") from None
    return head, lines


def _figure(column: str, known: dict) -> tuple[str, str, str, str] | None:
    """(figure, features, better, group) of a column: the longest metric that it begins with."""
    for name in sorted(known, key=len, reverse=True):
        if column == name:
            return (*known[name], "")
        begins = column.startswith(f"{name}_") and len(column) > len(name) + 1
        if begins and not column.lower().endswith(SPREADS):
            return (*known[name], column[len(name) + 1 :])
    return None


def _rows(line: dict[str, str], figures: dict, where: str) -> list[Row]:
    model = line[MODEL].strip()
    if not model:
        raise UserError(f"{where}: the row names no model in {MODEL}; fill it in or delete it")
    guidance = line.get(GUIDANCE, "").strip()
    rows = []
    for column, (metric, features, better, group) in figures.items():
        text = line[column].strip()
        if not text:
            continue
        rows.append(
            Row(
                model=model,
                data_set=line.get(DATA_SET, "").strip() or "not named",
                metric=metric,
                value=_number(text, column, where),
                better=better,
                guidance=_number(guidance, GUIDANCE, where) if guidance else None,
                group=group,
                features=features,
                protocol=PROTOCOL,
            )
        )
    return rows


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(
            f"{where}: {column} is {text!r}; write a number or leave it empty"
        ) from None
    return value if math.isfinite(value) else math.nan
