"""How the command prints: tables, JSON, single lines and the result of a run."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from etude.core.log import format_table

console = Console()


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table as wide as it needs to be; in a terminal long cells are folded instead."""
    if not console.is_terminal:
        print(format_table(title, columns, rows))
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def say(line: object) -> None:
    """A line as it is: paths are not wrapped, square brackets are no markup."""
    console.print(str(line), soft_wrap=True, markup=False, highlight=False)


def print_json(value: object) -> None:
    """JSON, in colours where the terminal has them; what is no JSON is printed as its text."""
    console.print_json(json.dumps(value, default=str))


def print_result(folder: Path, result: dict) -> None:
    """What a finished run found, or why it stopped; then where everything is."""
    if "stopped" in result:
        say(f"stopped ({result['stopped']}) and saved; type the same command to go on")
        return
    if "jobs" in result:
        from etude.study import summary

        print_table("jobs", *summary(result["jobs"]))
    else:
        print_json(result.get("headline", result))
    say(f"run  {folder}")
    if (folder / "page.html").exists():
        say(f"page {folder / 'page.html'}")
