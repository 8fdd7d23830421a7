"""Shared by all tests: markers that skip with a reason, and NaN-filled uninitialised memory."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    reasons = {"gpu": _no_gpu(), "root": _no_root()}
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name) and reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str:
    return "" if torch.cuda.is_available() else "needs a CUDA device: `make gpu` runs it"


def _no_root() -> str:
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [tool for tool in ("ip", "sshd", "pdsh") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else ""


@pytest.fixture(autouse=True)
def fetched_inputs(request: pytest.FixtureRequest) -> None:
    """`@pytest.mark.fetched("name", ...)`: skip unless `etude data fetch name` has been run."""
    marker = request.node.get_closest_marker("fetched")
    if marker is None:
        return
    root = Path(os.environ.get("ETUDE_DATA", "data"))
    missing = [name for name in marker.args if not (root / name).exists()]
    if missing:
        names = " ".join(missing)
        pytest.skip(f"needs inputs under {root}/: type `etude data fetch {names}`")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that an operator allocates and forgets to write shows as NaN."""
    new_empty, empty, empty_like = torch.Tensor.new_empty, torch.empty, torch.empty_like

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    yield
