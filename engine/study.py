"""Several jobs in one file: chains, sweeps and ablations; `etude demo` is one.

A job names a recipe, what to `set` in it, a `grid` of values to try, and which earlier jobs it
takes runs `from`. Every job is an ordinary run under `runs/`, so a study resumes by running what is
not finished, and two studies share the runs they have in common. A job that takes from a job with a
grid runs once per value. A study's own seed, unless it is 0, is the seed of all its jobs.
"""

import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.recipe import Recipe


class JobConfig(Config):
    """One job of a study."""

    recipe: str = option(..., "a recipe's name or path")
    set: dict[str, Any] = option({}, "dotted fields and their values")
    grid: dict[str, list[Any]] = option({}, "dotted fields and the values to try, all combinations")
    takes: dict[str, str] = Field(
        {}, alias="from", description="dotted fields and the jobs whose runs they name"
    )


class StudyRecipe(Recipe):
    """Jobs by name, run in the order of their dependencies."""

    kind: Literal["study"]
    jobs: dict[str, JobConfig] = option(..., "the jobs")
    max_minutes: float | None = option(
        None, "save and stop after this time", unit="minutes", gt=0, affects_result=False
    )


@dataclass(frozen=True)
class Instance:
    """A job with one combination of grid values; `label` tells it apart in tables.

    Attributes:
        values: dotted fields and their values as JSON, since a list has no hash.
    """

    job: str
    values: tuple[tuple[str, str], ...] = ()
    upstream: tuple[tuple[str, "Instance"], ...] = field(default=())

    @property
    def label(self) -> str:
        own = ", ".join(f"{name}={json.loads(value)}" for name, value in self.values)
        inherited = [i.label for _, i in self.upstream if "[" in i.label]
        inside = ", ".join([own] * bool(own) + inherited)
        return f"{self.job}[{inside}]" if inside else self.job


def instances(study: StudyRecipe) -> list[Instance]:
    """All jobs with their grids spelled out, each after those it takes from.

    Raises:
        UserError: a job takes from one that does not exist, or jobs wait for each other.
    """
    found: dict[str, list[Instance]] = {}
    waiting = dict(study.jobs)
    while waiting:
        # the first one of the file that can run, so that a file in order is run as it is written
        name = next((n for n in waiting if set(waiting[n].takes.values()) <= found.keys()), None)
        if name is None:
            raise UserError(
                f"jobs {', '.join(sorted(waiting))} of study {study.name} wait for each other or "
                f"take from a job that is not there: name one of {', '.join(study.jobs)}"
            )
        job = waiting.pop(name)
        found[name] = [
            Instance(
                name,
                tuple(zip(job.grid, map(json.dumps, values), strict=True)),
                tuple(zip(job.takes, upstream, strict=True)),
            )
            for values in itertools.product(*job.grid.values())
            for upstream in _consistent(job, found)
        ]
    return list(itertools.chain.from_iterable(found.values()))


def _consistent(job: JobConfig, found: dict[str, list[Instance]]) -> list[tuple[Instance, ...]]:
    """Combinations of upstream instances that do not mix two values of one upstream grid."""
    combinations = itertools.product(*(found[source] for source in job.takes.values()))
    return [combination for combination in combinations if _agree(combination)]


def _agree(upstream: tuple[Instance, ...]) -> bool:
    seen: dict[str, Instance] = {}
    stack = list(upstream)
    while stack:
        instance = stack.pop()
        if seen.setdefault(instance.job, instance) != instance:
            return False
        stack.extend(source for _, source in instance.upstream)
    return True


def overrides(study: StudyRecipe, instance: Instance, runs: dict[Instance, Path]) -> list[str]:
    """The dotted overrides that turn the job's recipe into this instance."""
    job = study.jobs[instance.job]
    values = ({"seed": study.seed} if study.seed else {}) | job.set
    values |= {name: json.loads(value) for name, value in instance.values}
    values |= {name: str(runs[source]) for name, source in instance.upstream}
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def run_study(
    study: StudyRecipe,
    *,
    run_job: Callable[[str, list[str], int, str], tuple[Path, dict]],
    show: Callable[[dict[str, dict]], None],
) -> dict:
    """Run every instance that is not finished and show what there is after every job.

    Args:
        run_job: (recipe, overrides, place, label) -> (run folder, result); a finished run returns
            at once, unless it is an evaluation.
        show: given the results so far, label -> result; called after every job.

    Returns:
        {"jobs": {label: result}, "runs": {label: folder}}, or {"stopped": reason} as soon as a job
        was stopped.
    """
    runs: dict[Instance, Path] = {}
    results: dict[str, dict] = {}
    for place, instance in enumerate(instances(study)):
        recipe = study.jobs[instance.job].recipe
        runs[instance], result = run_job(
            recipe, overrides(study, instance, runs), place, instance.label
        )
        if "stopped" in result:
            return {"stopped": result["stopped"], "job": instance.label}
        results[instance.label] = result
        show(results)
    folders = {instance.label: str(folder) for instance, folder in runs.items()}
    return {"jobs": results, "runs": folders}


def headline(result: dict) -> dict[str, float]:
    """The few numbers that stand for a job: its result's "headline", else its plain numbers."""
    numbers = result.get("headline", result)
    return {
        name: value
        for name, value in numbers.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "images_seen"
    }


def table(results: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """One row per job, one column per number that any job's headline has."""
    lines = {label: headline(result) for label, result in results.items()}
    columns = list(dict.fromkeys(name for numbers in lines.values() for name in numbers))
    rows = [
        [label, *(f"{numbers[c]:.5g}" if c in numbers else "" for c in columns)]
        for label, numbers in lines.items()
    ]
    return ["job", *columns], rows


def summary(results: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """The same for reading: one row per job, its headline as words."""
    rows = [
        [label, ", ".join(f"{n.replace('_', ' ')} {v:.4g}" for n, v in headline(result).items())]
        for label, result in results.items()
    ]
    return ["job", "result"], rows


def write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> None:
    """Write a table as CSV, whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    partial.replace(path)
