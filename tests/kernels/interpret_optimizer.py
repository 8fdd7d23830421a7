"""Run by test_optimizer_triton.py with TRITON_INTERPRET=1: one JSON row per check."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parent))
from test_optimizer import SETTINGS, errors, units

from etude import kernels
from etude.kernels import optimizer_triton

# One element, a block less one, a block, several chunks with a ragged end; nothing at all.
SIZES = (1, 511, 512, 1300, 0)
GUARD = 3.0  # what lies around each tensor and must stay


def true_fma(self, x, y, z):
    """The interpreter rounds x * y first; float64 holds that product exactly."""
    wide = [np.asarray(t.data, dtype=np.float64) for t in (x, y, z)]
    made = (wide[0] * wide[1] + wide[2]).astype(z.data.dtype)
    return interpreter.TensorHandle(made, z.dtype.scalar)


def tensor(size: int, shift: int, g: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values, the memory they are cut from): `shift` elements off a 64-byte boundary."""
    memory = torch.full((size + 64,), GUARD, dtype=dtype)
    first = (-memory.data_ptr() // memory.element_size()) % 16 + 16 + shift
    values = memory[first : first + size]
    values.copy_(torch.rand(size, generator=g) + 0.1)
    return values, memory


def lists(
    seed: int, profiles: int, shift: int, sizes: tuple[int, ...] = SIZES, low=None
) -> tuple[dict[str, list], list[Tensor]]:
    """Arguments of `adamw_ema` and all the memory they lie in. low: dtype of grads and copies."""
    g = torch.Generator().manual_seed(seed)
    memories = []

    def one(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values, memory = tensor(size, shift, g, dtype)
        memories.append(memory)
        return values

    made = {name: [one(n) for n in sizes] for name in ("params", "exp_avgs", "exp_avg_sqs")}
    made["grads"] = [one(n, low or torch.float32) for n in sizes]
    made["emas"] = [[one(n) for n in sizes] for _ in range(profiles)]
    made["copies"] = [one(n, low) for n in sizes] if low else None
    made["steps"] = [torch.tensor(float(7 * i)) for i in range(len(sizes))]
    memories += made["steps"]
    return made, memories


def take(made: dict[str, list], backend: str = "triton", **changes: object) -> None:
    decays = [0.9, 0.99, torch.tensor(0.999), 0.5, 0.6][: len(made["emas"])]
    with kernels.use_backend(backend):
        kernels.adamw_ema(**made, **(SETTINGS | {"ema_decays": decays} | changes))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """In units in the last place of the tensors' own float32; of float16 the values must agree."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.dtype == torch.float32:
            worst = max(worst, units(x, y.double()))
        elif not torch.equal(x, y):
            worst = max(worst, float((x - y).abs().max() / 2**-10))
    return worst


def against_reference() -> Iterator[dict]:
    for profiles, shift, low, changes in (
        (0, 0, None, {}),
        (1, 0, torch.float16, {"grad_scale": 0.7}),
        (2, 1, None, {"lr": torch.tensor(0.02), "found_inf": torch.tensor(0.0)}),
        (3, 2, torch.float16, {"grad_scale": torch.tensor(0.5)}),
        (4, 0, None, {"grad_scale": torch.tensor(0.5, dtype=torch.float64)}),
        (5, 0, None, {}),  # more than the kernel knows: the reference
    ):
        ours, mine = lists(1, profiles, shift, low=low)
        want, theirs = lists(1, profiles, shift, low=low)
        for _ in range(2):
            take(ours, **changes)
            take(want, "reference", **changes)
        name = f"{profiles} profiles, shift {shift}, {low}"
        yield {"check": "reference", "case": name, "error": difference(mine, theirs)}


def mixed_gradients() -> dict:
    ours, mine = lists(2, 1, 0)
    want, theirs = lists(2, 1, 0)
    for made in (ours, want):
        made["grads"][1] = made["grads"][1].half()
        made["grads"][3] = made["grads"][3].half()
    take(ours)
    take(want, "reference")
    return {"check": "mixed", "error": difference(mine, theirs)}


def guarded() -> dict:
    made, memories = lists(3, 2, 0, low=torch.float16)
    made["grads"][0].fill_(torch.nan)
    before = [m.clone() for m in memories]
    take(made, found_inf=torch.tensor(2.0))
    pairs = [(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(memories, before, strict=True)]
    return {"check": "guarded", "kept": all(torch.equal(a, b) for a, b in pairs)}


def slices() -> dict:
    """The bits of a whole tensor and of its parts, and of a second run."""
    whole, mine = lists(4, 1, 0, (1300,))
    again, theirs = lists(4, 1, 0, (1300,))
    cut, parts = lists(4, 1, 0, (1300,))
    take(whole)
    take(again)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    for first, last in ((0, 3), (3, 600), (600, 1300)):
        piece = {name: [cut[name][0][first:last]] for name in names}
        piece["emas"] = [[cut["emas"][0][0][first:last]]]
        take(piece | {"steps": [torch.zeros(())], "copies": None})
    return {
        "check": "bits",
        "slices": all(torch.equal(a, b) for a, b in zip(mine[:-1], parts[:-1], strict=True)),
        "repeats": all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)),
    }


def many_tensors() -> dict:
    """More tensors than one program of the first kernel counts, each with its own step."""
    sizes = tuple([2] * 131)
    ours, mine = lists(5, 1, 0, sizes)
    want, theirs = lists(5, 1, 0, sizes)
    take(ours)
    take(want, "reference")
    steps = [float(s) for s in ours["steps"]]  # started at 7 i
    return {
        "check": "many",
        "error": difference(mine, theirs),
        "steps": steps == [7.0 * i + 1 for i in range(131)],
    }


def tables() -> dict:
    """A table is found again, is never another call's, and the number kept is bounded."""
    optimizer_triton._tables.clear()
    made, _ = lists(6, 1, 0, (8,))
    take(made)
    first = len(optimizer_triton._tables)
    take(made)
    second = len(optimizer_triton._tables)
    worst = 0.0
    for seed in range(20):
        ours, mine = lists(seed, 1, 0, (5, 9))  # memory of the ones before, other sizes
        want, theirs = lists(seed, 1, 0, (5, 9))
        ours["grads"] = [g.clone() for g in ours["grads"]]  # other addresses, same params
        take(ours)
        take(want, "reference")
        worst = max(worst, difference(mine, theirs))
    aligned = []
    for shift in (0, 1):
        optimizer_triton._tables.clear()
        take(lists(6, 1, shift, (8,), torch.float16)[0])
        table = next(iter(optimizer_triton._tables.values()))
        aligned.append(int(table[0, optimizer_triton._ALIGNED]))
    return {
        "check": "tables",
        "aligned": aligned,
        "first": first,
        "second": second,
        "error": worst,
        "kept": len(optimizer_triton._tables),
    }


def operator() -> dict:
    """As torch.compile sees it."""
    eager, mine = lists(7, 1, 0, (5, 3), torch.float16)
    compiled, theirs = lists(7, 1, 0, (5, 3), torch.float16)
    take(eager, lr=torch.tensor(0.01))
    step = torch.compile(take, fullgraph=True, backend="aot_eager")
    step(compiled, lr=torch.tensor(0.01))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    two, _ = lists(8, 1, 0, (5, 3), torch.float16)
    torch.library.opcheck(
        torch.ops.etude.triton_adamw_ema.default,
        (
            two["params"], two["grads"], two["exp_avgs"], two["exp_avg_sqs"], two["emas"][0],
            two["steps"], two["copies"], torch.tensor(0.01), [torch.tensor(0.9)], None, None,
            0.9, 0.99, 1e-8, 0.1,
        ),
        test_utils=tests,
    )  # fmt: skip
    same = all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    return {"check": "compiled", "same": same}


def main() -> None:
    interpreter.InterpreterBuilder.create_fma = true_fma
    print(json.dumps({"check": "float64", "errors": errors(3000)}))
    for row in against_reference():
        print(json.dumps(row))
    for check in (mixed_gradients, guarded, slices, many_tensors, tables, operator):
        print(json.dumps(check()))


main()
