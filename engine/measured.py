"""What has been measured of a recipe: rows of `benchmarks/results/*.jsonl`; called by the doctor.

A row counts for the recipe that it names (`recipe` or `study`), or for every recipe whose network
it trained in the recipe's precision (`model`: a preset's name; `dtype`; `input_size`, 32 unless
given; `semantic`, class unless given). It holds pictures per second (`images_s`), or the `seconds`
of a whole run. A recipe that a study changed in what its speed depends on has no row, and neither
has one that has changed since (`fingerprint`). Rows of other libraries (a `provider` that is not
etude) do not count, and of each device the newest row does.
Nothing is estimated: hours are pictures over pictures per second of one device, or not known.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from etude.core.errors import UserError
from etude.core.recipe import Recipe, fingerprint, load_recipe

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Measured:
    """One device's speed at a recipe.

    Attributes:
        device: the GPU's name, or the processor's with its number of cores.
        images_s: training pictures per second; None where only a whole run was timed.
        hours: of the whole recipe on that device alone.
        source: results file and date.
    """

    device: str
    images_s: float | None
    hours: float
    source: str


def measured(recipe: Recipe) -> list[Measured]:
    """What the results say of a recipe (not of a study's jobs), this machine's device first."""
    newest: dict[str, tuple[str, Measured]] = {}
    for name, row in _rows():
        found = _of(recipe, name, row)
        time = str(row.get("time", ""))
        if found is not None and time >= newest.get(found.device, ("",))[0]:
            newest[found.device] = (time, found)
    here = device_name()
    return sorted(
        (found for _, found in newest.values()), key=lambda m: (m.device != here, m.device)
    )


def time_rows(recipe: Recipe, price_per_hour: float | None = None) -> list[list[str]]:
    """Rows (what, how much): pictures per second, hours, and what those cost, where measured.

    Args:
        price_per_hour: of one device; None leaves cost out.
    """
    found, total, expects = measured(recipe), images(recipe), recipe.expects
    rows = [["images", f"{total:,}"]] if total else []
    rates = [m for m in found if m.images_s is not None]
    rows += [["images/s", f"{m.images_s:,.4g} on {m.device} ({m.source})"] for m in rates]
    if total and all(m.device != device_name() for m in rates):
        rows.append(["images/s", f"not measured on {device_name()}"])
    rows += _hours(found, price_per_hour)
    if expects.hours is not None:
        place = expects.hardware or "hardware that the recipe does not name"
        rows.append(["time", f"{length(expects.hours)} on {place}, as the recipe says"])
        if price_per_hour is not None and not found:
            cost = _cost(expects.hours, price_per_hour)
            rows.append(["cost", f"{cost} for each device of {place}"])
    elif not found:
        on = f" on {expects.hardware}" if expects.hardware else ""
        rows.append(["time", f"not measured{on}"])
        rows += [["cost", "not measured"]] if price_per_hour is not None else []
    return rows


def study_rows(
    study: Recipe, jobs: Iterable[tuple[str, Recipe]], price_per_hour: float | None = None
) -> list[list[str]]:
    """The same for all runs of a study together; those that two jobs share count once.

    Args:
        jobs: (job, recipe) of every run, grids spelled out.
    """
    runs: dict[str, tuple[str, Recipe]] = {}
    for label, job in jobs:
        runs.setdefault(fingerprint(job), (label, job))
    rows = [["runs", f"{len(runs):,}"]]
    total = sum(images(job) or 0 for _, job in runs.values())
    rows += [["images", f"{total:,}, in training"]] if total else []
    tables = {key: {m.device: m.hours for m in measured(job)} for key, (_, job) in runs.items()}
    devices = dict.fromkeys(device for hours in tables.values() for device in hours)
    found = [
        Measured(device, None, sum(hours[device] for hours in tables.values()), "sum of the runs")
        for device in devices
        if all(device in hours for hours in tables.values())
    ]
    rows += _hours(found, price_per_hour)
    if found and not measured(study) and study.expects.hours is None:
        return rows
    if not found:
        lacking = dict.fromkeys(label for key, (label, _) in runs.items() if not tables[key])
        rows.append(["not measured", ", ".join(lacking)])
    return rows + time_rows(study, price_per_hour)


def length(hours: float) -> str:
    """A time in hours, or in minutes below one."""
    return f"{hours:,.4g} hours" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def _hours(found: list[Measured], price_per_hour: float | None) -> list[list[str]]:
    rows = []
    for m in found:
        rows.append(["time", f"{length(m.hours)} on one {m.device} ({m.source})"])
        if price_per_hour is not None:
            rows.append(["cost", f"{_cost(m.hours, price_per_hour)} on one {m.device}"])
    return rows


def _cost(hours: float, price_per_hour: float) -> str:
    return f"{hours * price_per_hour:,.4g} = {hours:,.4g} hours x {price_per_hour:g}"


def images(recipe: Recipe) -> int | None:
    """Pictures that a recipe trains on; None for a kind whose length is not in pictures."""
    if recipe.kind == "judge":
        return recipe.judge.images
    return getattr(getattr(recipe, "loop", None), "images", None)


def device_name() -> str:
    """This machine's device, as results name it: its GPU, or its processor and cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = "unknown processor"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return _processor(name, os.cpu_count())


def results_folder() -> Path:
    """Where the results lie: ETUDE_RESULTS, or the checkout that this code runs from."""
    stated = os.environ.get("ETUDE_RESULTS")
    return Path(stated or Path(__file__).resolve().parents[1] / "benchmarks" / "results")


def _rows() -> list[tuple[str, dict]]:
    """(file name, row) of every row that could tell a recipe's speed."""
    found = []
    for path in sorted(results_folder().glob("*.jsonl")):
        for line in path.read_text().splitlines():
            if '"images_s"' in line or '"seconds"' in line:
                found.append((path.name, json.loads(line)))
    return found


def _of(recipe: Recipe, name: str, row: dict) -> Measured | None:
    own = recipe.name in (row.get("recipe"), row.get("study"))
    if own and row.get("fingerprint", fingerprint(recipe)) != fingerprint(recipe):
        return None  # of the recipe as it was
    if not (own or _same_network(recipe, row)):
        return None
    if row.get("provider", "etude") != "etude" or "processor" not in row:
        return None
    rate, total = row.get("images_s"), images(recipe)
    if rate and total and (not own or _as_named(recipe, whole=False)):
        hours = total / rate / 3600
    elif own and row.get("seconds") and _as_named(recipe, whole=True):
        rate, hours = None, row["seconds"] / 3600
    else:
        return None
    gpu = row.get("device") == "cuda" or "NVIDIA" in row["processor"]
    device = row["processor"] if gpu else _processor(row["processor"], row.get("cores"))
    step = "" if own else "; the step alone, on data that is there"
    return Measured(device, rate, hours, f"{name}, {str(row.get('time', ''))[:10]}{step}")


def _as_named(recipe: Recipe, *, whole: bool) -> bool:
    """Whether a study left the recipe as named: wholly, or as far as a step's speed goes."""
    try:
        named = load_recipe(recipe.name)
    except UserError:  # a file of somebody's own
        return True
    if whole:
        return fingerprint(named) == fingerprint(recipe)
    return _step(named) == _step(recipe)


def _step(recipe: Recipe) -> dict:
    """What a training step's speed depends on; a model's control is little of that."""
    sections = recipe.model_dump(include={"model", "data", "strategy", "judge"})
    asked = sections.get("model", {}).pop("conditioning", {})
    sections["asked"] = [asked.get("semantic"), asked.get("text_tokens")]
    sections["micro_batch"] = getattr(getattr(recipe, "loop", None), "micro_batch", None)
    return sections if recipe.kind == "judge" else sections | {"judge": None}


def _same_network(recipe: Recipe, row: dict) -> bool:
    if recipe.kind != "ldm" or not row.get("model"):
        return False
    size, dtype = row.get("input_size", 32), _DTYPES[recipe.strategy.precision]
    return (
        row["model"] == recipe.model.preset
        and size == recipe.model.input_size
        and row.get("dtype", dtype) == dtype
        and row.get("semantic", "class") == recipe.model.conditioning.semantic
    )


def _processor(name: str, cores: int | None) -> str:
    return f"{name}, {cores} cores"
