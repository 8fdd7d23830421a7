"""What a job says: console, `log.txt` and `metrics.jsonl`; one `Log` per process.

Rank 0 writes all three. Other ranks are silent, except that their warnings go to `log-rank<R>.txt`.
A terminal gets live bars (rich); anything else gets one plain line every twenty seconds. Metrics
are one JSON object a line, written in one call, so that a killed job leaves at most one broken last
line, which the next `Log` on the folder removes.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .files import to_json, write_bytes_atomic

_LINE_EVERY_SECONDS = 20.0


class Progress:
    """A bar or a line that counts up to `total`; made by `Log.progress`."""

    def __init__(self, log: "Log", description: str, total: int, unit: str, done: int) -> None:
        self._log, self._description, self._unit = log, description, unit
        self.total, self.done = total, done
        self._first, self._begin = done, time.monotonic()
        self._last_line, self._shown = self._begin, ""
        self._bar: Any = None
        self._task: Any = None

    @property
    def rate(self) -> float:
        """Units per second since this progress began."""
        return (self.done - self._first) / max(time.monotonic() - self._begin, 1e-9)

    def advance(self, count: int = 1, **shown: float | str) -> None:
        """Count `count` more units; `shown` are figures displayed beside the rate."""
        self.done += count
        if self._log.on_advance is not None:
            self._log.on_advance()
        if shown:
            self._shown = "  ".join(f"{key} {_figure(value)}" for key, value in shown.items())
        if self._bar is not None:
            rate = f"{self.rate:,.1f} {self._unit}/s"
            self._bar.update(self._task, completed=self.done, rate=rate, shown=self._shown)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            self._log._line(self.line())

    def line(self) -> str:
        """The state in one line: done, total, rate, time left."""
        left = (self.total - self.done) / self.rate if self.done > self._first else None
        remaining = f", {_duration(left)} left" if left is not None else ""
        text = f"{self._description}: {self.done:,}/{self.total:,} {self._unit}"
        text += f", {self.rate:,.1f} {self._unit}/s{remaining}"
        return f"{text}  {self._shown}" if self._shown else text


class Log:
    """The messages and metrics of one process.

    Args:
        folder: the run's folder, or None to write no files.
        rank: 0 writes; others are silent.
        quiet: True prints nothing but warnings; None and False print, with live bars when standard
            error is a terminal.

    Attributes:
        on_advance: called whenever a progress counts on; a job whose phases may end at any point
            puts `Stopper.check` here, so that each of them notices a request to stop.
    """

    def __init__(self, folder: Path | None, *, rank: int = 0, quiet: bool | None = None) -> None:
        self.folder, self.rank, self.quiet = folder, rank, bool(quiet)
        self.on_advance: Callable[[], None] | None = None
        self.live = rank == 0 and not self.quiet and sys.stderr.isatty()
        self._console: Any = None
        self._metrics: int | None = None
        if folder is not None and rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            repair_metrics(folder / "metrics.jsonl")
        if self.live:
            with contextlib.suppress(ImportError):
                from rich.console import Console

                self._console = Console(stderr=True, highlight=False)
        self.live = self._console is not None

    def info(self, message: str) -> None:
        """A message for console and log.txt."""
        if self.rank == 0:
            self._line(message)
            self._write("log.txt", message)

    def warn(self, message: str) -> None:
        """Like `info`, marked as a warning; shown even when quiet, kept from every rank."""
        if self.rank == 0:
            self._line(f"warning: {message}", always=True, style="yellow")
        self._write(
            "log.txt" if self.rank == 0 else f"log-rank{self.rank}.txt", f"warning: {message}"
        )

    def metrics(self, name: str, images_seen: int, **values: float) -> None:
        """Append `values` measured at `images_seen`; NaN and infinities are stored as null."""
        if self.folder is None or self.rank != 0:
            return
        record = {"time": round(time.time(), 3), "name": name, "images_seen": int(images_seen)}
        line = to_json({**record, **values}) + "\n"
        if self._metrics is None:
            path = self.folder / "metrics.jsonl"
            self._metrics = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(self._metrics, line.encode("utf-8"))

    def rewind(self, images_seen: int) -> None:
        """Drop every metric at or after `images_seen`: the job goes on from there."""
        if self.folder is None or self.rank != 0:
            return
        self.close()
        path = self.folder / "metrics.jsonl"
        kept = [r for r in read_metrics(path) if r.get("images_seen", 0) < images_seen]
        if path.exists():
            write_bytes_atomic(path, "".join(to_json(r) + "\n" for r in kept).encode("utf-8"))

    @contextlib.contextmanager
    def progress(
        self, description: str, total: int, unit: str = "images", done: int = 0
    ) -> Iterator[Progress]:
        """Count work up to `total`, starting at `done`, with rate and time left."""
        progress = Progress(self, description, total, unit, done)
        if not self.live:
            yield progress
            if self.rank == 0 and not self.quiet and progress.done > done:
                self._line(progress.line())
            return
        with _bars(self._console) as bars:
            progress._bar = bars
            progress._task = bars.add_task(
                description, total=total, completed=done, rate="", shown=""
            )
            yield progress

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table on the console and, in plain text, in log.txt."""
        if self.rank != 0:
            return
        plain = format_table(title, columns, rows)
        self._write("log.txt", "\n" + plain)
        if self._console is None:
            self._line(plain)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._console.print(table)

    def close(self) -> None:
        """Close the metrics file; it is opened again when needed."""
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None

    def _line(self, message: str, *, always: bool = False, style: str | None = None) -> None:
        if self.rank != 0 or (self.quiet and not always):
            return
        if self._console is not None:
            self._console.print(message, style=style, markup=False)
        else:
            with contextlib.suppress(BrokenPipeError):  # whoever read it is gone; the job goes on
                print(message, file=sys.stderr, flush=True)

    def _write(self, file: str, message: str) -> None:
        if self.folder is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with open(self.folder / file, "a", encoding="utf-8") as stream:
            stream.write(f"{stamp}  {message}\n")


def read_metrics(path: Path, name: str | None = None) -> list[dict]:
    """The records of a metrics file, of one `name` if given; broken lines are left out."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and name in (None, record.get("name")):
                    records.append(record)
    return records


def repair_metrics(path: Path) -> None:
    """Remove a half-written last line, so that the next record starts on a line of its own."""
    try:
        stream = open(path, "r+b")
    except FileNotFoundError:
        return
    with stream:
        end = stream.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            stream.seek(start)
            newline = stream.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            stream.truncate(position)


def format_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table in plain text with aligned columns."""
    cells = [columns, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    return "\n".join([title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def number(value: float) -> str:
    """A short human number: 0.0123, 1.2e-05, 12,000, 1.2M."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e3:
        return f"{value:,.0f}"
    if value == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.1e}"


def _bars(console: Any) -> Any:
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[shown]}"),
        console=console,
        transient=False,
    )


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
