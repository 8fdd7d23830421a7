"""The walls of the house: imports go downwards, and each optional library has one owner."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "engine"

# A file directly in engine/ is in the room "jobs" unless it is named here.
TOP = ("__init__", "__main__", "cli", "cli_kernels", "cli_output", "cli_practice", "cli_recipe")
TOP += ("doctor",)
ROOM_OF_FILE = dict.fromkeys(TOP, "top")
FLOORS = {
    "external": 1,
    "core": 0,
    "data": 2,
    "models": 2,
    "diffusion": 2,
    "metrics": 3,  # above models: an extractor may be one of our own classifiers
    "practice": 4,
    "evaluation": 4,
    "transfer": 4,
    "convert": 4,
    "jobs": 5,
    "top": 6,
}
OWNERS = {
    "deepspeed": {"core/strategy_zero.py"},
    "nvidia": {"data/decode_dali.py"},
    "webdataset": {"data/shards.py"},
    "diffusers": {"external/diffusers.py", "external/diffusers_fused.py"},
    "transformers": {"external/transformers.py"},
    "timm": {"external/timm.py"},
    "torchmetrics": {"external/torchmetrics.py"},
    "pyarrow": {"external/pyarrow.py"},
    "accelerate": set(),
    "torchvision": set(),
    "triton": set(),
    "xformers": set(),
    "flash_attn": set(),
}


def room(parts: tuple[str, ...]) -> str:
    """The room of a module given by its path below engine/ (without .py)."""
    return parts[0] if parts[0] in FLOORS else ROOM_OF_FILE.get(parts[0], "jobs")


def imports(file: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in a file, wherever it stands."""
    package = ("etude", *file.relative_to(ENGINE).parent.parts)
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            found.append((node.lineno, module))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def below_engine(module: str) -> tuple[str, ...] | None:
    """Path parts of an engine module, or None for anything else (and for plain names in it)."""
    parts = module.split(".")
    if parts[0] != "etude" or len(parts) < 2 or parts[1] in ("kernels", "recipes"):
        return None
    inner = ENGINE.joinpath(*parts[1:])
    if not (inner.is_dir() or inner.with_suffix(".py").exists()):
        return None
    return tuple(parts[1:])


def engine_files() -> list[Path]:
    return sorted(ENGINE.rglob("*.py"))


def wrong_edges(file: Path) -> list[str]:
    here = room(file.relative_to(ENGINE).with_suffix("").parts)
    wrong = []
    for line, module in imports(file):
        target = below_engine(module)
        if target is None:
            continue
        there = room(target)
        if there != here and FLOORS[there] >= FLOORS[here]:
            where = f"{file.relative_to(ROOT)}:{line}"
            wrong.append(f"{where}: {here} (floor {FLOORS[here]}) imports {module}")
    return wrong


def test_no_import_goes_upwards_or_sideways() -> None:
    # engine/__init__.py names everything lazily and is on the top floor.
    wrong = [edge for file in engine_files() for edge in wrong_edges(file)]
    assert not wrong, "\n".join(wrong)


def test_an_upward_import_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("core/rng.py", "data/order.py", "models/dit.py", "cli.py"):
        (tmp_path / "engine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "engine" / name).write_text("")
    bad = tmp_path / "engine/data/order.py"
    text = "from etude.models.dit import DiT\nfrom ..cli import main\nfrom etude.core import rng\n"
    bad.write_text(text)
    monkeypatch.setitem(globals(), "ENGINE", tmp_path / "engine")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = wrong_edges(bad)
    assert any("imports etude.models.dit" in f for f in found)
    assert any("imports etude.cli" in f for f in found)
    assert not any("etude.core" in f for f in found)


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_each_optional_library_has_one_owner(library: str) -> None:
    users = {
        str(file.relative_to(ENGINE))
        for file in engine_files()
        for _, module in imports(file)
        if module.split(".")[0] == library
    }
    assert users <= OWNERS[library], f"{library} is imported by {users - OWNERS[library]}"


def test_kernels_import_nothing_of_the_engine() -> None:
    wrong = []
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.ImportFrom):
                names = ["etude"] if node.level > 1 else []
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            wrong += [f"{file.name}:{node.lineno}" for n in names if n.split(".")[0] == "etude"]
    assert not wrong, wrong
