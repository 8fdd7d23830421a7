"""Shared by the operators' tests: processes in which Triton's interpreter runs the kernels."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def interpret() -> Callable[[str], list[dict]]:
    """Run `interpret_<family>.py` with TRITON_INTERPRET=1; it prints one JSON row per case.

    The interpreter must be chosen before Triton is imported, so it has a process of its own.
    """
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def run(family: str) -> list[dict]:
        made = subprocess.run(
            [sys.executable, str(HERE / f"interpret_{family}.py")],
            env=os.environ | {"TRITON_INTERPRET": "1", "ETUDE_KERNELS": "triton"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert made.returncode == 0, made.stderr[-3000:]
        return [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]

    return run
