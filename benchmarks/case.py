"""What one benchmark case is; `cases/<family>.py` lists them, `registry.py` runs them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
Shape = tuple[int, ...]
Inputs = dict[str, Any]
Run = Callable[[Inputs], object]


def hash_of(*files: Path) -> str:
    """Sixteen hexadecimal digits that change when a file does."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """One operator in one use.

    make: (shape, dtype, device) to inputs: random, the same for the same arguments, with
        requires_grad set on the leaves whose gradients `run` takes.
    run: one call through the public function, with whatever backend is in force. What it returns is
        compared with the float64 reference before anything is timed, so an operator that works in
        place returns what it has changed.
    bytes_moved: what any implementation must read and write once; flops: what it must compute.
    rivals: other libraries' ways to the same result, name to factory; ImportError where absent.
    """

    op: str
    variant: str
    make: Callable[[Shape, torch.dtype, str], Inputs]
    run: Run
    cpu_shapes: dict[str, Shape]
    gpu_shapes: dict[str, Shape]
    bytes_moved: Callable[[Inputs], int]
    flops: Callable[[Inputs], int] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    sources: tuple[str, ...] = ()
    rivals: dict[str, Callable[[], Run]] = field(default_factory=dict)
    compiled: bool = True

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant}"

    def source_hash(self) -> str:
        """A row is stale when this differs from the tree's."""
        return hash_of(*(ROOT / name for name in self.sources))


def with_gradients(forward: Run, names: tuple[str, ...], upstream: tuple[str, ...]) -> Run:
    """`forward`, then the gradients of inputs `names` for the upstream gradients `upstream`."""

    def run(inputs: Inputs) -> object:
        outputs = forward(inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves, given = [inputs[n] for n in names], [inputs[n] for n in upstream]
        return *outputs, *torch.autograd.grad(outputs, leaves, given)

    return run
