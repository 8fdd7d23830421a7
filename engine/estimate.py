"""What a recipe needs before it starts: files, disk, memory; called by `etude doctor RECIPE`.

Sizes are arithmetic over the parameter counts of models built without memory, so nothing is loaded
or trained. What activations and frozen networks take is not estimated; `--dry-run` takes one real
step instead. Speed, hours and cost come from `measured.py`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from etude.core.errors import UserError
from etude.core.recipe import Recipe, leaves, load_recipe
from etude.core.strategy import StrategyConfig
from etude.data.labelled_folders import split_source

from .fetching import DIGITS, needs
from .measured import study_rows, time_rows
from .study import StudyRecipe, instances, overrides

# Fields that name something on the disk, by the last part of their dotted path.
_SHARDS = {"shards", "held_out", "monitor", "test", "real", "train", "real_train", "generated"}
_RUNS = {"autoencoder", "generator", "judge"}
_FILES = {"weights"}
_FROM_JOB = "from:"  # stands for a run that an earlier job of a study leaves


@dataclass(frozen=True)
class NeededFile:
    """Something on the disk that a recipe names.

    Attributes:
        field: dotted field that names it.
        path: as the recipe says it.
        present: whether it is there.
        digest: hash of its content, shortened; "" when it is absent or has no one file.
        command: what to type when it is absent.
        made: the job makes it by itself when it starts.
    """

    field: str
    path: str
    present: bool
    digest: str
    command: str
    made: bool = False


def needed_files(recipe: Recipe) -> list[NeededFile]:
    """Every file, folder of shards and run that the recipe (or each job of a study) reads."""
    found = []
    for label, job, _ in _jobs(recipe):
        prefix = f"{label}: " if label else ""
        known = {str(need.path): need for need in needs(job)}
        for field, path, role in _named(job):
            place, need = _resolve(path, role), known.get(path)
            command = " ; ".join(need.commands) if need else _command(path, role)
            made = need is not None and need.name == DIGITS
            digest = content_digest(place) if place else ""
            found.append(NeededFile(prefix + field, path, place is not None, digest, command, made))
    unique = {(item.field, item.path): item for item in found}
    return list(unique.values())


def content_digest(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file, or of the index or manifest of a folder."""
    names = ("index.json", "manifest.json", "recipe.yaml", "config.json")
    files = [path] if path.is_file() else [path / name for name in names]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return ""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def parameter_count(recipe: Recipe) -> int | None:
    """Trainable parameters of what the recipe trains; None for a kind that trains nothing."""
    return _count(_build(recipe))


def discriminator_count(recipe: Recipe) -> int:
    """Parameters of the discriminator that an autoencoder is trained against; 0 without one."""
    if recipe.kind != "autoencoder" or recipe.adversarial is None:
        return 0
    from etude.models.discriminator import PatchDiscriminator

    with torch.device("meta"):
        config = recipe.adversarial.discriminator
        return _count(PatchDiscriminator(config, recipe.model.in_channels)) or 0


def memory_rows(recipe: Recipe, world_size: int = 1) -> list[list[str]]:
    """Rows (what, size per process) of weights, gradients, moments and averages."""
    count, second = parameter_count(recipe), discriminator_count(recipe)
    if count is None:
        return []
    sizes = state_bytes(count, recipe, world_size)
    if second:
        sizes["discriminator, its gradients and moments"] = discriminator_bytes(second, recipe)
    device = sum(size for name, size in sizes.items() if not name.endswith("(host)"))
    rows = [["parameters", f"{count:,}"]]
    rows += [["parameters of the discriminator", f"{second:,}"]] if second else []
    rows += [[name, gigabytes(size)] for name, size in sizes.items()]
    rows.append(["together, without activations", gigabytes(device)])
    rows.append(["free", gigabytes(free_memory())])
    return rows


def state_bytes(count: int, recipe: Recipe, world_size: int = 1) -> dict[str, float]:
    """Bytes per process of everything kept for `count` parameters under the recipe's strategy.

    ZeRO shards the optimizer's state from stage 1, gradients from stage 2, weights from stage 3;
    below float32 weights the optimizer keeps a float32 master copy of its share, and plain torch
    adds gradients up in float32.
    """
    strategy = getattr(recipe, "strategy", None)
    averages = len(getattr(getattr(recipe, "optim", None), "ema", ()))
    return _state_bytes(count, strategy, averages, world_size)


def discriminator_bytes(count: int, recipe: Recipe) -> float:
    """Bytes per process of a discriminator: whole on every one, in plain torch, not averaged."""
    strategy = StrategyConfig(kind="local", precision=recipe.strategy.precision)
    return sum(_state_bytes(count, strategy, 0, 1).values())


def _state_bytes(
    count: int, strategy: StrategyConfig | None, averages: int, world_size: int
) -> dict[str, float]:
    zero = strategy is not None and strategy.kind == "zero"
    half = strategy is not None and strategy.precision == "bf16"
    stage = (1 if strategy.stage is None else strategy.stage) if zero else 0
    if zero and half and stage == 0:
        stage = 1  # how the strategy runs it
    width = 2 if half else 4
    share = count / world_size if stage >= 1 else count
    host = " (host)" if strategy is not None and strategy.offload else ""
    sizes = {
        "weights": width * (count / world_size if stage >= 3 else count),
        "gradients": (width if zero else 4) * (count / world_size if stage >= 2 else count),
    }
    if half or stage >= 1:
        sizes[f"master weights{host}"] = 4 * share
    sizes[f"two moments{host}"] = 8 * share
    if averages:
        sizes[f"{averages} weight average{'s' * (averages > 1)}{host}"] = 4 * averages * share
    return sizes


def disk_sentence(recipe: Recipe) -> str:
    """What the run's checkpoints take, beside what the disk has left; "" without checkpoints."""
    from etude.core.checkpoint import disk_need

    loop, count = getattr(recipe, "loop", None), parameter_count(recipe)
    if loop is None or count is None:
        return ""
    numbers = count * (3 + len(recipe.optim.ema)) + 3 * discriminator_count(recipe)
    need = disk_need(numbers, loop.checkpoint, loop.images)
    folder = Path("runs").resolve()
    while not folder.exists():
        folder = folder.parent
    return f"{need.sentence}; {gigabytes(shutil.disk_usage(folder).free)} are free in {folder}"


def free_memory() -> float:
    """Bytes free on the GPU, or available to this process on the host."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def gigabytes(size: float) -> str:
    """A size with three digits, in GB or MB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _jobs(recipe: Recipe) -> Iterator[tuple[str, Recipe, int]]:
    """(job, recipe, runs) of a study's jobs, the first run of each; others are one without name."""
    if not isinstance(recipe, StudyRecipe):
        yield "", recipe, 1
        return
    runs: dict[str, list[Recipe]] = {}
    for label, job in study_runs(recipe):
        runs.setdefault(label, []).append(job)
    for label, jobs in runs.items():
        yield label, jobs[0], len(jobs)


def study_runs(study: StudyRecipe) -> Iterator[tuple[str, Recipe]]:
    """(job, recipe) of every run of a study, with what it takes from other jobs named so."""
    found = instances(study)
    places = {instance: Path(f"{_FROM_JOB}{instance.label}") for instance in found}
    for instance in found:
        job = study.jobs[instance.job]
        yield instance.job, load_recipe(job.recipe, overrides(study, instance, places))


def _named(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(dotted field, path, role) of every field that names something on the disk."""
    for path, value, _ in leaves(recipe):
        key, text = path[-1], str(value)
        if path == ("text", "encoders"):
            yield from ((".".join(path), encoder, "file") for encoder in value)
        if not isinstance(value, str | Path) or not text or text.startswith(_FROM_JOB):
            continue
        profile = text == "raw" or text.startswith("ema:")
        shards = key in _SHARDS or "tests" in path
        role = "shards" if shards else "run" if key in _RUNS else ""
        if key in _FILES and not profile and ("extractor" in path or "perceptual" in path):
            role = "file"
        if path == ("start", "from"):
            role = "start"
        if isinstance(value, Path) and not role:
            role = "file"
        if role:
            yield ".".join(map(str, path)), text, role


def _resolve(path: str, role: str) -> Path | None:
    places = [Path(path), Path("runs") / path]
    if role == "shards":  # or a folder of pictures, its layout before a colon
        places = [split_source(path)[1]]
    return next((place for place in places if place.exists()), None)


def _command(path: str, role: str) -> str:
    if role == "run" and Path(path).parts[:-1] not in ((), ("runs",)):
        return f"put a model's folder at {path}, or name a run of yours (`etude runs list`)"
    if role == "run":
        return f"etude train RECIPE --run {Path(path).name} (`etude runs list` shows your runs)"
    if role == "start":
        return "name a run (`etude runs list`), a weights file or a folder with one in this field"
    if role == "shards":
        return "etude start FOLDER writes shards from your pictures; then set this field"
    return "etude data list shows what can be fetched; then set this field"


def _count(model: nn.Module | None) -> int | None:
    return sum(p.numel() for p in model.parameters()) if model is not None else None


def _build(recipe: Recipe) -> nn.Module | None:
    """The model a recipe trains, without memory for its weights."""
    with torch.device("meta"):
        if recipe.kind == "ldm":
            from etude.models.families import build_denoiser

            return build_denoiser(recipe.model)
        if recipe.kind == "autoencoder":
            from etude.external.diffusers import Autoencoder

            try:
                return Autoencoder.build(recipe.model)
            except UserError:  # diffusers is not installed: its row says so
                return None
        if recipe.kind == "practice":
            from etude.models.classifiers import build_classifier

            return build_classifier(recipe.learner.model)
    return None


def describe(
    recipe: Recipe, price_per_hour: float | None = None
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables (title, columns, rows) of a recipe's needs; `price_per_hour` is one device's."""
    files = [
        [item.field, item.path, "yes" if item.present else "missing", item.digest, item.command]
        for item in needed_files(recipe)
    ]
    for row in files:
        row[4] = "" if row[2] == "yes" else row[4]
    tables: list[tuple[str, list[str], list[list[str]]]] = [
        ("files", ["field", "path", "there", "sha256", "type this"], files)
    ]
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for label, job, runs in _jobs(recipe):
        rows = memory_rows(job, world_size)
        disk = disk_sentence(job)
        rows += [["disk", disk]] if disk else []
        rows += time_rows(job, price_per_hour)
        title = f"{label} ({job.name}, {runs} run{'s' * (runs > 1)})" if label else job.name
        tables.append((f"{title}: size, per process", ["what", "how much"], rows))
    if isinstance(recipe, StudyRecipe):
        rows = study_rows(recipe, list(study_runs(recipe)), price_per_hour)
        tables.append((f"{recipe.name}: all jobs", ["what", "how much"], rows))
    return tables
