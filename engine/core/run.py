"""A run is a folder: opened by every job, resumed by the same command, read by page and tables.

    runs/<recipe>-<hash>/  recipe.yaml  environment.json  metrics.jsonl  log.txt  page.html
                           checkpoints/  grids/  lock.json (being written)
                           result.json (finished)  REQUEUE (saved, wants to be started again)

The hash covers the fields that change results, so a changed recipe is a new run, while speed and
logging fields may differ when a run is resumed.
"""

import contextlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .environment import environment
from .errors import UserError
from .files import read_json, to_json, write_json_atomic, write_text_atomic
from .lock import Lock, is_stale, read_lock
from .log import read_metrics
from .recipe import Recipe, differences, fingerprint, load_recipe, to_yaml
from .recipe_tree import nearest

__all__ = ["Run", "RunSummary", "describe", "folder_name", "list_runs", "load_run", "summaries"]
__all__ += ["read_json", "to_json", "write_json_atomic"]


class Run:
    """A job's folder, held by one writer; a context manager that releases it.

    Attributes:
        folder, checkpoints, grids: the run's folder and two inside it.
        recipe: the checked recipe of this start.
        resumed: whether the folder held an earlier start.
    """

    def __init__(self, folder: Path, recipe: Recipe, lock: Lock | None, resumed: bool) -> None:
        self.folder, self.recipe, self.resumed = folder, recipe, resumed
        self.checkpoints, self.grids = folder / "checkpoints", folder / "grids"
        self._lock = lock

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        *,
        root: Path = Path("runs"),
        name: str | None = None,
        resume_with_changes: bool = False,
        rank: int = 0,
    ) -> "Run":
        """Create or resume the folder of `recipe` below `root`.

        Args:
            recipe: a checked recipe.
            root: where runs live.
            name: the folder's name instead of recipe name and hash.
            resume_with_changes: accept fields that change results; `recipe.yaml` then holds the
                new values and `changes.jsonl` what they were.
            rank: every rank but 0 only needs the folder; it writes and locks nothing.

        Raises:
            UserError: another process writes there, or the folder holds a different job.
        """
        folder = Path(root) / (name if name is not None else folder_name(recipe))
        if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", name):
            raise UserError(f"run={name}: use letters, digits, dots, dashes and underscores")
        if rank != 0:
            return cls(folder, recipe, None, (folder / "recipe.yaml").exists())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(folder)
        except OSError as error:
            raise UserError(
                f"the run's folder {folder} cannot be written: {error.strerror}; choose another "
                "place with root=FOLDER"
            ) from None
        run = cls(folder, recipe, lock, (folder / "recipe.yaml").exists())
        try:
            run._begin(resume_with_changes)
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self, resume_with_changes: bool) -> None:
        if self.resumed:
            old = load_recipe(self.folder / "recipe.yaml")
            if fingerprint(old) != fingerprint(self.recipe):
                changed = differences(old, self.recipe)
                if not resume_with_changes:
                    raise UserError(_refusal(self.folder, changed))
                record = {"time": time.time(), "changed": changed}
                with open(self.folder / "changes.jsonl", "a", encoding="utf-8") as stream:
                    stream.write(to_json(record) + "\n")
        self.checkpoints.mkdir(exist_ok=True)
        self.grids.mkdir(exist_ok=True)
        if self.finished() is not None:
            return  # a finished run keeps the record of what made it
        write_text_atomic(self.folder / "recipe.yaml", to_yaml(self.recipe, comments=False))
        self._record_start()
        self.clear_requeue()

    def _record_start(self) -> None:
        path, earlier = self.folder / "environment.json", []
        with contextlib.suppress(UserError, AttributeError, TypeError):
            old = read_json(path)
            brief = {key: old.get(key) for key in ("date", "host", "revision", "command")}
            earlier = [*old.get("earlier_starts", []), brief]
        write_json_atomic(path, {**environment(), "earlier_starts": earlier[-100:]})

    def finished(self) -> dict | None:
        """The result of a finished run, or None."""
        path = self.folder / "result.json"
        return read_json(path) if path.exists() else None

    def finish(self, result: dict) -> None:
        """Record `result`; from now on the run is finished. Does nothing on ranks but 0."""
        if self._lock is None:
            return
        write_json_atomic(self.folder / "result.json", result)
        self.clear_requeue()

    def request_requeue(self, reason: str, images_seen: int = 0) -> None:
        """Leave the file that tells a scheduler to start this job again (rank 0)."""
        if self._lock is None:
            return
        content = {"reason": reason, "images_seen": images_seen, "time": time.time()}
        write_json_atomic(self.folder / "REQUEUE", content)

    def clear_requeue(self) -> None:
        """The job goes on, or is done: remove the file (rank 0)."""
        if self._lock is not None:
            (self.folder / "REQUEUE").unlink(missing_ok=True)

    def requeue_requested(self) -> dict | None:
        """Why and where the job stopped, if it wants to be started again."""
        path = self.folder / "REQUEUE"
        return read_json(path) if path.exists() else None

    @property
    def held(self) -> bool:
        """False when another process has taken this folder over: stop writing then."""
        return self._lock is None or self._lock.held

    def close(self) -> None:
        """Release the folder; calling it again is fine."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class RunSummary:
    """A run as a table shows it.

    Attributes:
        state: "finished", "running" or "interrupted".
        requeue: it saved on request and waits to be started again.
        holder: "host:pid" of the process that writes it, while running.
        metrics: the last record of each name in metrics.jsonl.
    """

    name: str
    folder: Path
    kind: str
    recipe: str
    state: str
    requeue: bool
    images_seen: int
    started: str
    holder: str | None
    metrics: dict[str, dict] = field(default_factory=dict)
    result: dict | None = None


def folder_name(recipe: Recipe) -> str:
    """`<recipe name with dashes>-<first 10 hex digits of the fingerprint>`."""
    stem = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", recipe.name).strip("-.") or recipe.kind
    return f"{stem}-{fingerprint(recipe)[:10]}"


def load_run(path: str | Path, *, root: Path = Path("runs")) -> tuple[Recipe, Path]:
    """Recipe and folder of an existing run, by its folder or its name below `root`; read-only."""
    for folder in (Path(path), Path(root) / path):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml"), folder
    names = [folder.name for folder in _folders(Path(root))]
    near = nearest(str(path), names)
    hint = f"did you mean `{near}`?" if near else f"`etude runs list` shows those in {root}"
    raise UserError(f"there is no run `{path}`; {hint}")


def list_runs(root: Path = Path("runs")) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of every run below `root` for `etude runs list`."""
    columns = ["run", "kind", "state", "images", "started", "last numbers"]
    return columns, [_row(run) for run in summaries(root)]


def summaries(root: Path = Path("runs")) -> list[RunSummary]:
    """Every run below `root`, the latest started first."""
    runs = [describe(folder) for folder in _folders(Path(root))]
    return sorted(runs, key=lambda run: run.started, reverse=True)


def describe(folder: str | Path) -> RunSummary:
    """State, progress and last metrics of a run; never fails on a damaged file."""
    folder = Path(folder)
    kind = recipe = ""
    with contextlib.suppress(UserError):
        loaded = load_recipe(folder / "recipe.yaml")
        kind, recipe = loaded.kind, loaded.name
    started = _json_or(folder / "environment.json").get("date") or ""
    result = _json_or(folder / "result.json") if (folder / "result.json").exists() else None
    lock = read_lock(folder / "lock.json")
    running = lock is not None and not is_stale(folder / "lock.json", lock)
    last = {r["name"]: r for r in read_metrics(folder / "metrics.jsonl") if "name" in r}
    requeue = _json_or(folder / "REQUEUE")
    seen = [r.get("images_seen") for r in [*last.values(), requeue]]
    return RunSummary(
        name=folder.name,
        folder=folder,
        kind=kind,
        recipe=recipe,
        state="finished" if result is not None else "running" if running else "interrupted",
        requeue=bool(requeue),
        images_seen=max((count for count in seen if isinstance(count, int)), default=0),
        started=str(started),
        holder=f"{lock.get('host')}:{lock.get('pid')}" if running and lock else None,
        metrics=last,
        result=result,
    )


def _row(run: RunSummary) -> list[str]:
    state = f"running ({run.holder})" if run.holder and run.state == "running" else run.state
    shown = []
    for name, record in run.metrics.items():
        fields = [key for key in record if key not in ("time", "name", "images_seen")]
        numbers = [k for k in fields if isinstance(record[k], int | float)][:2]
        shown += [f"{name} {key} {record[key]:.4g}" for key in numbers]
    if run.requeue:
        state += ", start it again to go on"
    seen = f"{run.images_seen:,}"
    return [run.name, run.kind, state, seen, run.started[:19], ", ".join(shown[:4])]


def _refusal(folder: Path, changed: list[tuple[str, Any, Any]]) -> str:
    lines = "".join(f"\n  {name}: {old} -> {new}" for name, old, new in changed)
    return (
        f"{folder} holds a different job; give another run=NAME, or resume_with_changes=true to "
        f"go on with these changes:{lines}"
    )


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(folder for folder in root.iterdir() if (folder / "recipe.yaml").is_file())


def _json_or(path: Path) -> dict:
    with contextlib.suppress(UserError):
        content = read_json(path)
        if isinstance(content, dict):
            return content
    return {}
