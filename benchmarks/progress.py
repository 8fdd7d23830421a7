"""pytest plugin of `run.py`: one bar with the operator or file at work and the time left.

On a terminal only; elsewhere a run says nothing until it ends. Failures are reported either way.
"""

import sys
from collections.abc import Iterator

import pytest
from rich import progress as rich
from rich.console import Console


def subject(item: pytest.Item) -> str:
    """What an item is about: a row's case, or the file of a test."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    return getattr(case, "name", None) or item.path.stem


class Bar:
    """Drawn between the tests alone: while one runs, its output is pytest's to capture."""

    def __init__(self, console: Console) -> None:
        self.bar = rich.Progress(
            rich.TextColumn("{task.description:44.44}"),
            rich.BarColumn(bar_width=24),
            rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=120,
            transient=True,
        )

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.task = self.bar.add_task("", total=len(session.items))
        self.bar.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.bar.update(self.task, description=subject(item), refresh=True)
        done = yield
        self.bar.update(self.task, advance=1, refresh=True)
        return done

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.bar.stop()


def pytest_configure(config: pytest.Config) -> None:
    console = Console(file=sys.stderr)
    if console.is_terminal:
        config.pluginmanager.register(Bar(console), "etude-bar")


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dot per test."""
    if report.passed and report.when == "call":
        return "passed", "", ""
    return ("skipped", "", "") if report.skipped else None
