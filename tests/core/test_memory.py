"""Freed memory is kept for the next tensor of a process that asked for that, and in no other."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from etude.core.memory import keep_freed
took = keep_freed() if sys.argv[1] == "kept" else None
def fill():
    kept = [torch.ones(6, 1 << 20) for _ in range(5)]  # 120 MiB, all freed at once
for _ in range(20):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **more: str) -> tuple[str, int]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    made = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        env=given | {"OMP_NUM_THREADS": "1"} | more,
    )
    took, count = made.stdout.split()
    return took, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has mallopt")
def test_pages_are_asked_for_once() -> None:
    pages = 5 * (24 << 20) // os.sysconf("SC_PAGESIZE")
    took, kept = faults("kept")
    assert took == "True" and kept < 2 * pages
    given_back = faults("given back")[1]
    assert given_back > 9 * pages or given_back < 100  # the latter where pages are huge
    took, _ = faults("kept", MALLOC_TRIM_THRESHOLD_="131072")
    assert took == "False"
