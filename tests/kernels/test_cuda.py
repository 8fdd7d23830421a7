"""The CUDA kernels: run on the CPU, thread by thread, from the very files that nvcc compiles.

`cuda_on_cpu/` stands in for the CUDA runtime; what it checks besides the values is said there.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, compiling_cuda

ROOT = Path(__file__).resolve().parents[2]

# RMS of the error over RMS of the value. float32: sums of up to 4096 terms in another order, with
# float32's 6e-8 each; 16-bit types: half a unit in the last place of the stored results (2^-9 of
# bfloat16, 2^-12 of float16), twice for y and the gradients behind a rounded `out`.
RATIO = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
OPS = ("adaln_modulate", "gate_residual", "gate_residual_adaln")


def make(shape: tuple[int, int, int], dtype: torch.dtype, branch: torch.dtype) -> dict[str, Tensor]:
    """x with a mean far from zero; shift, scale and gate are to be chunks of `mod`."""
    B, N, D = shape
    g = torch.Generator().manual_seed(B * N * D)
    x = torch.randn(B, N, D, generator=g, dtype=torch.float64) * 2 + 3
    h, mod = torch.randn(B, N, D, generator=g), torch.randn(B, 3 * D, generator=g)
    bias = torch.randn(D, generator=g)
    return {"x": x.to(dtype), "h": h.to(branch), "mod": mod.to(branch), "bias": bias.to(branch)}


def ours(op: str, data: dict[str, Tensor], norm: str, biased: bool, packed: bool) -> list[Tensor]:
    x, h, bias = data["x"], data["h"], data["bias"] if biased else None
    gate, shift, scale = data["mod"].chunk(3, 1)
    if op == "adaln_modulate":
        if packed:
            return [kernels.adaln_modulate(x, modulation=data["mod"][:, x.shape[2] :], norm=norm)]
        return [kernels.adaln_modulate(x, shift, scale, norm=norm)]
    if op == "gate_residual":
        return [kernels.gate_residual(x, h, gate, bias=bias)]
    if packed:
        return list(kernels.gate_residual_adaln(x, h, modulation=data["mod"], bias=bias, norm=norm))
    return list(kernels.gate_residual_adaln(x, h, gate, shift, scale, bias=bias, norm=norm))


def exact(op: str, data: dict[str, Tensor], norm: str, biased: bool, packed: bool) -> list[Tensor]:
    """The operator from torch's own norms, in float64."""
    gate, shift, scale = (m.unsqueeze(1) for m in data["mod"].chunk(3, 1))
    branch = data["h"] + data["bias"] if biased else data["h"]
    out = data["x"] + gate * branch if "gate" in op else data["x"]
    if op == "gate_residual":
        return [out]
    functional = torch.nn.functional
    if norm == "layernorm":
        normed = functional.layer_norm(out, out.shape[-1:], eps=1e-6)
    else:
        normed = functional.rms_norm(out, out.shape[-1:], eps=1e-6)
    y = normed * (1 + scale) + shift
    return [y] if op == "adaln_modulate" else [out, y]


def run(function: Callable, op: str, data: dict[str, Tensor], *options) -> dict[str, Tensor]:
    """Outputs and gradients, for a loss that weighs every output element differently."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in data.items()}
    outputs = function(op, leaves, *options)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, generator=g).bfloat16() for o in outputs]
    weights = [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    made = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    return made | {f"d{k}": d for k, d in zip(leaves, grads, strict=True) if d is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).square().mean().sqrt()
        size = want[name].double().square().mean().sqrt()
        assert error <= ratio * size + 1e-12, f"{name}: error ratio {float(error / size):.2e}"


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "norm", "biased"),
    [
        ((2, 35, 384), "layernorm", True),
        ((3, 7, 768), "rmsnorm", False),
        ((1, 9, 1024), "layernorm", True),
        ((2, 37, 1152), "layernorm", True),
        ((1, 1, 1152), "rmsnorm", True),
        ((2, 5, 64), "layernorm", True),
        ((1, 3, 8), "rmsnorm", False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "autocast"])
def test_values_and_gradients(cuda, guarded, op, shape, norm, biased, dtypes) -> None:
    if dtypes == "autocast":
        data = make(shape, torch.float32, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(ours, op, data, norm, biased, False)
        assert got["output0"].dtype == (torch.bfloat16 if op == OPS[0] else torch.float32)
        bound = RATIO[torch.bfloat16]
    else:
        data = make(shape, FLOATS[dtypes], FLOATS[dtypes])
        got = run(ours, op, data, norm, biased, shape[1] % 2 == 1)
        bound = RATIO[FLOATS[dtypes]]
    wide = {k: v.double() for k, v in data.items()}
    assert_close(got, run(exact, op, wide, norm, biased, False), bound)


@pytest.mark.parametrize("op", [OPS[0], OPS[2]])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 3, 1536), "bfloat16"), ((1, 3, 2048), "float32"), ((2, 2, 4096), "float16")],
)
def test_rows_of_several_warps(cuda, guarded, op, shape, dtype) -> None:
    data = make(shape, FLOATS[dtype], FLOATS[dtype])
    got = run(ours, op, data, "layernorm", op == OPS[2], False)
    wide = {k: v.double() for k, v in data.items()}
    want = run(exact, op, wide, "layernorm", op == OPS[2], False)
    assert_close(got, want, RATIO[FLOATS[dtype]])


def test_same_bits_in_every_order_of_threads_and_blocks(cuda, built) -> None:
    """A missing barrier, or a sum whose order is not fixed, would change them."""
    runs = []
    cases = [((2, 37, 1152), torch.bfloat16), ((2, 9, 384), torch.float32)]
    cases.append(((1, 3, 2048), torch.bfloat16))
    for order in (0, 1, 2, 3):
        built[1].cuda_on_cpu_order(order)
        try:
            made = [
                run(ours, op, make(shape, dtype, dtype), "layernorm", True, False)
                for shape, dtype in cases
                for op in OPS[1:]
            ]
        finally:
            built[1].cuda_on_cpu_order(0)
        runs.append([t for one in made for t in one.values()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_many_samples_and_chunks(cuda, guarded) -> None:
    """More samples than the third stage has warps, and several blocks per sample."""
    data = make((35, 21, 16), torch.float32, torch.float32)
    got = run(ours, OPS[2], data, "layernorm", True, True)
    wide = {k: v.double() for k, v in data.items()}
    assert_close(got, run(exact, OPS[2], wide, "layernorm", True, False), RATIO[torch.float32])


def test_strided_and_misaligned_inputs(cuda) -> None:
    data = make((2, 9, 64), torch.bfloat16, torch.bfloat16)
    want = run(ours, OPS[2], data, "layernorm", True, False)
    strided = dict(data)
    strided["x"] = data["x"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["h"] = torch.stack([data["h"], data["h"]], -1)[..., 0]
    flat = torch.cat([data["mod"].new_zeros(1), data["mod"].flatten()])
    strided["mod"] = flat[1:].view_as(data["mod"])
    assert strided["mod"].data_ptr() % 16 == 2
    outputs = ours(OPS[2], strided, "layernorm", True, False)
    for i, out in enumerate(outputs):
        assert torch.equal(out, want[f"output{i}"])


def test_only_y_is_used(cuda, guarded) -> None:
    """The final layer: no gradient reaches `out`, and backward gets none."""
    data = make((1, 5, 128), torch.float32, torch.float32)
    grads = []
    for function, wide in ((ours, data), (exact, {k: v.double() for k, v in data.items()})):
        leaves = {k: v.clone().requires_grad_() for k, v in wide.items()}
        y = function(OPS[2], leaves, "layernorm", True, False)[1]
        y.square().sum().backward()
        grads.append({k: v.grad for k, v in leaves.items()})
    assert_close(*grads, 2 * RATIO[torch.float32])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_zero_size(cuda, op, shape) -> None:
    got = run(ours, op, make(shape, torch.float32, torch.float32), "layernorm", False, False)
    assert got["output0"].shape == shape
    assert torch.equal(got["dmod"], torch.zeros(shape[0], 3 * shape[2]))


@pytest.mark.parametrize(
    ("shape", "x", "branch"),
    [
        ((1, 2, 36), torch.float32, torch.float32),
        ((1, 2, 4104), torch.float32, torch.float32),
        ((1, 2, 16), torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_what_has_no_kernel_runs_elsewhere(cuda, monkeypatch, shape, x, branch) -> None:
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    monkeypatch.setattr(backends, "cuda", lambda: pytest.fail("a CUDA kernel was called"))
    data = make(shape, x, branch)
    got = run(ours, "gate_residual", data, "layernorm", False, False)
    wide = {k: v.double() for k, v in data.items()}
    assert_close(got, run(exact, "gate_residual", wide, "layernorm", False, False), RATIO[x])


def test_the_extension_refuses_what_it_has_no_kernel_for(cuda) -> None:
    absent = (0, 0, 0, 0)
    some = (16, cuda.FLOAT32, 64, 8)
    half = (16, cuda.FLOAT16, 64, 8)
    for width, tensors in ((12, [some] * 8), (8, [half, some, *[absent] * 6])):
        with pytest.raises(RuntimeError, match="no CUDA kernel"):
            cuda.adaln_forward((1, 1, width), tensors, [0, 0], 1e-6, False, 8, (0, 0))


def test_operators_keep_the_rules_of_torch_library(cuda) -> None:
    data = make((2, 5, 8), torch.float32, torch.float32)
    x, h, mod, bias = (t.requires_grad_() for t in data.values())
    gate, shift, scale = (t.detach().requires_grad_() for t in mod.chunk(3, 1))
    ops = torch.ops.etude
    check = torch.library.opcheck
    check(ops.cuda_adaln_modulate.default, (x, shift, scale, 1e-6, False, None))
    check(ops.cuda_gate_residual.default, (x, h, gate, None))
    both = (x, h, mod, bias, 1e-6, True, None)
    check(ops.cuda_gate_residual_adaln_packed.default, both)


def test_compiles_without_a_break(cuda) -> None:
    data = make((2, 5, 64), torch.float32, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda leaves: ours(OPS[2], leaves, "rmsnorm", True, True),
                             fullgraph=True, backend="aot_eager")  # fmt: skip
    got = run(lambda op, leaves: compiled(leaves), OPS[2], data)
    assert_close(got, run(ours, OPS[2], data, "rmsnorm", True, True), 1e-6)


SIZES = [(37, 5), (1,), (), (8195,), (0, 3), (129, 129), *[(3,)] * 40]
SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def state_of(profiles: int, seed: int = 0, low: torch.dtype | None = None) -> dict[str, list]:
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=g) for s in SIZES]
    made = {
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "emas": [[p.clone() for p in params] for _ in range(profiles)],
        "steps": [torch.full((), float(i % 3)) for i in range(len(params))],
    }
    return made | ({"copies": [p.to(low) for p in params]} if low else {})


def step(state: dict[str, list], grads: list[Tensor], **changes) -> None:
    decays = [0.9, torch.tensor(0.999), 0.5, 0.9999][: len(state["emas"])]
    settings = SETTINGS | {"lr": 3e-3, "ema_decays": decays} | changes
    lists = dict(state)
    kernels.adamw_ema(lists.pop("params"), grads, **lists, **settings)


def flat(state: dict[str, list]) -> list[Tensor]:
    return [t for k, v in state.items() for t in (sum(v, []) if k == "emas" else v)]


needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")


@needs_cpp
@pytest.mark.parametrize("profiles", [0, 1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_has_the_bits_of_the_cpp_twin(cuda, monkeypatch, profiles, dtype) -> None:
    """Many tensors a launch, several launches, odd sizes; numbers and tensors as scalars."""
    low = torch.bfloat16 if profiles else None
    fast, slow = state_of(profiles, low=low), state_of(profiles, low=low)
    cuda_pick = backends.pick
    for index in range(3):
        g = torch.Generator().manual_seed(index)
        grads = [torch.randn(s, generator=g).to(FLOATS[dtype]) for s in SIZES]
        changes = {"lr": torch.tensor(1e-3 * (index + 1)), "grad_scale": torch.tensor(0.7)}
        changes = changes if index else {"found_inf": torch.tensor(0.0)}
        monkeypatch.setattr(backends, "pick", cuda_pick)
        step(fast, grads, **changes)
        monkeypatch.setattr(backends, "pick", lambda *args, **options: "cpp")
        step(slow, grads, **changes)
    assert all(torch.equal(a, b) for a, b in zip(flat(fast), flat(slow), strict=True))


def test_adamw_takes_slices_that_start_anywhere(cuda) -> None:
    whole, parts = state_of(2), state_of(2)
    grads = [torch.randn(s).half() for s in SIZES]
    step(whole, grads)
    for first, last in ((0, 1), (1, 778), (778, 8195)):
        piece = {k: [v[3][first:last]] for k, v in parts.items() if k not in ("emas", "steps")}
        piece["emas"] = [[profile[3][first:last]] for profile in parts["emas"]]
        step(piece | {"steps": [parts["steps"][3].clone()]}, [grads[3][first:last]])
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert torch.equal(whole[name][3], parts[name][3])
    assert torch.equal(whole["emas"][1][3], parts["emas"][1][3])


def test_adamw_in_half_precision_gradients_and_copies(cuda) -> None:
    state, want = state_of(1, low=torch.float16), state_of(1, low=torch.float16)
    grads = [torch.randn(s).half() for s in SIZES]
    step(state, grads, grad_scale=0.5)
    params = want.pop("params")
    settings = SETTINGS | {"lr": 3e-3, "ema_decays": [0.9], "grad_scale": 0.5}
    kernels.adamw_ema_reference(params, grads, **want, **settings)
    for a, b in zip(flat(state), flat({"params": params} | want), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7 if a.dtype == torch.float32 else 1e-3, atol=1e-9)


@pytest.mark.parametrize("flag", [1.0, float("nan")])
def test_found_inf_leaves_everything_as_it_was(cuda, flag) -> None:
    state = state_of(1, low=torch.bfloat16)
    before = [t.clone() for t in flat(state)]
    bad = [torch.full(s, float("nan")) for s in SIZES]
    step(state, bad, found_inf=torch.tensor(flag))
    assert all(torch.equal(a, b) for a, b in zip(flat(state), before, strict=True))


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (0, b""),
        (2, b"divergence: thread 32"),
        (3, b"divergence: thread 7 of block 0,0 has returned, thread 0 at the barrier"),
        (4, b"wrote 0 bytes beyond its shared memory"),
        (5, b"with lane 3, which has returned"),
    ],
)
def test_the_machine_finds_faults(launch_fault, which: int, words: bytes) -> None:
    out = (ctypes.c_float * 64)()
    said = launch_fault.launch_fault(which, out, 256)
    assert said.startswith(words) if not words else words in said


def test_the_machine_shows_a_missing_barrier_and_unwritten_memory(launch_fault) -> None:
    out = (ctypes.c_float * 64)()
    made = {}
    for which in (0, 1):
        for order in (0, 1):
            launch_fault.cuda_on_cpu_order(order)
            assert launch_fault.launch_fault(which, out, 256) == b""
            made[which, order] = list(out)
    launch_fault.cuda_on_cpu_order(0)
    assert made[0, 0] == made[0, 1] == [float(63 - i) for i in range(64)]
    assert str(made[1, 0]) != str(made[1, 1])
    assert launch_fault.launch_fault(6, out, 256) == b"" and out[0] != out[0]
    assert b"49152 were asked for" in launch_fault.launch_fault(0, out, 50000)


def test_registers_and_spills() -> None:
    """nvcc's numbers for three GPUs are the committed ones; none spills.

    The bfloat16 kernels and the small files are compiled here; the other dtypes are the same
    templates and are compiled when the budget is written, of which the sources' hash tells.
    """
    if compiling_cuda.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    sources = [ROOT / "csrc/cuda" / f"{n}.cu" for n in ("adaln", "adaln_bfloat16", "optimizer")]
    seen = set()
    for row in compiling_cuda.measure(sources):
        limits = compiling_cuda.budget(row["family"]).get(row["toolchain"])
        assert row["spills"] == 0, row
        if limits is not None:
            assert limits[row["kernel"]] == {k: row[k] for k in ("registers", "spills")}, row
        seen.add((row["toolchain"].split("_")[-1], row["family"]))
    assert len(seen) == 2 * len(compiling_cuda.ARCHS)


@pytest.mark.parametrize("family", ["adaln", "optimizer"])
def test_budgets_are_those_of_the_sources(family: str) -> None:
    budget = compiling_cuda.budget(family)
    again = "type python -m etude.kernels.compiling_cuda --write"
    assert budget.pop("sources") == compiling_cuda.sources_hash(family), again
    for kernels_of in budget.values():
        assert all(numbers["spills"] == 0 for numbers in kernels_of.values())


def test_two_blocks_of_backward_fit_a_multiprocessor(cuda, built) -> None:
    """227 KB of shared memory on sm_90, and 65,536 registers: 128 threads with 255 at most."""
    built[1].cuda_on_cpu_most_shared()
    run(ours, OPS[2], make((1, 3, 1152), torch.bfloat16, torch.bfloat16), "layernorm", True, False)
    built[1].cuda_on_cpu_most_shared.restype = ctypes.c_size_t
    assert 2 * built[1].cuda_on_cpu_most_shared() <= 227 * 1024
