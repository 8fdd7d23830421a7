"""adaLN and gated residuals: C++ and reference against autograd in float64."""

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from etude import kernels
from etude.kernels import adaln, backends

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# RMS of the error over RMS of the value. float32: sums of up to 1152 terms in another order;
# bfloat16: half a unit in the last place of inputs already rounded, twice for the fused residual.
RATIO = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
NORMS = ("layernorm", "rmsnorm")
needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")


def make(
    batch: int, rows: int, width: int, dtype: torch.dtype, *, bias: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """x with a mean far from zero, and gate, shift and scale side by side in one tensor."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows, width, generator=g, dtype=torch.float64) * 2 + 3
    h = torch.randn(batch, rows, width, generator=g, dtype=torch.float64)
    mod = torch.randn(batch, 3 * width, generator=g, dtype=torch.float64)
    made = {"x": x.to(dtype), "h": h.to(dtype), "mod": mod.to(dtype)}
    if bias:
        made["bias"] = torch.randn(width, generator=g, dtype=torch.float64).to(dtype)
    return made


def exact(
    op: str, x: Tensor, h: Tensor, mod: Tensor, norm: str, bias: Tensor | None = None
) -> list[Tensor]:
    """The operator from torch's own layer_norm and rms_norm, in the dtype of x."""
    gate, shift, scale = (m.unsqueeze(1) for m in mod.chunk(3, 1))
    out = x + gate * (h if bias is None else h + bias) if "gate" in op else x
    if op == "gate_residual":
        return [out]
    normalise = torch.nn.functional.layer_norm if norm == "layernorm" else _rms_norm
    y = normalise(out, out.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return [y] if op == "adaln_modulate" else [out, y]


def _rms_norm(x: Tensor, shape: torch.Size, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, shape, eps=eps)


def ours(
    op: str, x: Tensor, h: Tensor, mod: Tensor, norm: str, bias: Tensor | None = None
) -> list[Tensor]:
    """Three vectors, chunk() views; `packed` below takes the one tensor instead."""
    gate, shift, scale = mod.chunk(3, 1)
    if op == "adaln_modulate":
        return [kernels.adaln_modulate(x, shift, scale, norm=norm)]
    if op == "gate_residual":
        return [kernels.gate_residual(x, h, gate, bias=bias)]
    return list(kernels.gate_residual_adaln(x, h, gate, shift, scale, bias=bias, norm=norm))


def packed(
    op: str, x: Tensor, h: Tensor, mod: Tensor, norm: str, bias: Tensor | None = None
) -> list[Tensor]:
    if op == "adaln_modulate":
        width = x.shape[-1]  # a view whose rows are 3 * width apart
        return [kernels.adaln_modulate(x, modulation=mod[:, width:], norm=norm)]
    return list(kernels.gate_residual_adaln(x, h, modulation=mod, bias=bias, norm=norm))


def run(function, op: str, data: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    """Outputs and gradients, for a loss that weighs every output element differently."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in data.items()}
    more = {"bias": leaves["bias"]} if "bias" in leaves else {}
    outputs = function(op, leaves["x"], leaves["h"], leaves["mod"], norm, **more)
    g = torch.Generator().manual_seed(9)
    loss = sum(
        (o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).double().sum()
        for o in outputs
    )
    loss.backward()
    made = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    return made | {f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).square().mean().sqrt()
        size = want[name].double().square().mean().sqrt()
        assert error <= ratio * size + 1e-12, f"{name}: error ratio {float(error / size):.2e}"


@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual", "gate_residual_adaln"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(2, 70, 63), (3, 5, 199), (1, 130, 1152), (2, 1, 16)], ids=str)
@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        pytest.param("cpp", torch.float32, marks=needs_cpp, id="cpp-float32"),
        pytest.param("cpp", torch.bfloat16, marks=needs_cpp, id="cpp-bfloat16"),
        pytest.param("reference", torch.float32, id="reference-float32"),
        pytest.param("reference", torch.bfloat16, id="reference-bfloat16"),
        pytest.param("reference", torch.float16, id="reference-float16"),
    ],
)
def test_forward_and_backward(op: str, norm: str, shape, choice: str, dtype: torch.dtype) -> None:
    data = make(*shape, dtype)
    with kernels.use_backend(choice):
        got = run(ours, op, data, norm)
    want = run(exact, op, {k: v.double() for k, v in data.items()}, norm)
    assert got["output0"].dtype == dtype
    assert_close(got, want, RATIO[dtype])


@pytest.mark.parametrize("width", [64, 72, 128, 384, 768, 1024, 1152, 1536, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("choice", CHOICES)
def test_packed_modulation_and_bias(width: int, choice: str, dtype: torch.dtype) -> None:
    """Every width of the DiT family; B and N odd, and more samples than one."""
    data = make(3, 7, width, dtype, bias=True)
    with kernels.use_backend(choice):
        got = run(packed, "gate_residual_adaln", data, "layernorm")
    want = run(exact, "gate_residual_adaln", {k: v.double() for k, v in data.items()}, "layernorm")
    assert_close(got, want, RATIO[dtype])


@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual_adaln"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_packed_has_the_bits_of_three_vectors(op: str, bias: bool, choice: str) -> None:
    """130 rows: three chunks of the first stage."""
    data = make(2, 130, 72, torch.bfloat16, bias=bias and op != "adaln_modulate")
    with kernels.use_backend(choice):
        one, three = run(packed, op, data, "rmsnorm"), run(ours, op, data, "rmsnorm")
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


@needs_cpp
def test_gradient_of_the_packed_tensor_is_the_buffer_itself() -> None:
    data = make(2, 5, 64, torch.float32)
    leaves = {k: v.requires_grad_() for k, v in data.items()}
    with torch.profiler.profile() as profile:
        out, y = kernels.gate_residual_adaln(leaves["x"], leaves["h"], modulation=leaves["mod"])
        torch.autograd.grad([out, y], list(leaves.values()), [data["h"], data["x"]])
    used = {event.key for event in profile.key_averages()}
    assert "etude::gate_residual_adaln_backward" in used
    assert not used & {"aten::cat", "aten::stack", "aten::copy_", "aten::zeros", "aten::add"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 70, 63), (1, 1, 1152)], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
def test_gate_residual_with_a_bias(shape, bias: bool, choice: str) -> None:
    data = make(*shape, torch.float32, bias=bias)
    with kernels.use_backend(choice):
        got = run(ours, "gate_residual", data, "layernorm")
    want = run(exact, "gate_residual", {k: v.double() for k, v in data.items()}, "layernorm")
    assert_close(got, want, RATIO[torch.float32])


@needs_cpp
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used: int) -> None:
    """The gradient of the other output is absent (the final layer uses y alone)."""

    def one(function):
        def call(*arguments, **more):
            return [function(*arguments, **more)[used]]

        return call

    data = make(2, 70, 63, torch.float32, bias=True)
    got = run(one(packed), "gate_residual_adaln", data, "layernorm")
    wide = {k: v.double() for k, v in data.items()}
    want = run(one(exact), "gate_residual_adaln", wide, "layernorm")
    assert_close(got, want, RATIO[torch.float32])


@needs_cpp
@pytest.mark.parametrize("norm", NORMS)
def test_float32_stream_with_bfloat16_branch_and_modulation(norm: str) -> None:
    data = make(2, 9, 384, torch.bfloat16, bias=True)
    data |= {"x": data["x"].float(), "bias": data["bias"].float()}
    got = run(packed, "gate_residual_adaln", data, norm)
    assert [got[n].dtype for n in ("output0", "output1", "dx", "dbias")] == [torch.float32] * 4
    assert [got[n].dtype for n in ("dh", "dmod")] == [torch.bfloat16] * 2
    want = run(exact, "gate_residual_adaln", {k: v.double() for k, v in data.items()}, norm)
    assert_close(got, want, RATIO[torch.bfloat16])
    assert_close(
        {n: got[n] for n in ("output0", "output1", "dx")},
        {n: want[n] for n in ("output0", "output1", "dx")},
        RATIO[torch.float32],
    )


@needs_cpp
@pytest.mark.parametrize("operator", ["gate_residual", "gate_residual_adaln"])
def test_checkpointing_recomputes_the_same_bits(operator: str) -> None:
    data = make(2, 9, 64, torch.float32, bias=True)
    form = ours if operator == "gate_residual" else packed

    def recomputed(op, x, h, mod, norm, bias):
        return torch.utils.checkpoint.checkpoint(
            form, op, x, h, mod, norm, bias, use_reentrant=False
        )

    got = run(recomputed, operator, data, "layernorm")
    want = run(form, operator, data, "layernorm")
    assert all(torch.equal(got[name], want[name]) for name in want)


@needs_cpp
@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual", "gate_residual_adaln"])
def test_a_second_derivative_raises(op: str) -> None:
    data = make(2, 3, 8, torch.float32)
    leaves = [v.requires_grad_() for v in data.values()]
    total = sum(o.square().sum() for o in ours(op, *leaves, "layernorm"))
    (first,) = torch.autograd.grad(total, leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("choice", CHOICES)
def test_one_column_is_all_shift(choice: str) -> None:
    data = make(2, 3, 1, torch.float32)
    shift, scale = data["mod"][:, :1], data["mod"][:, 1:2]
    with kernels.use_backend(choice):
        y = kernels.adaln_modulate(data["x"], shift, scale)
    torch.testing.assert_close(y, shift.unsqueeze(1).expand_as(y), rtol=0, atol=0)


@pytest.mark.parametrize("choice", CHOICES)
def test_float64_stays_float64(choice: str) -> None:
    data = make(2, 9, 63, torch.float64)
    with kernels.use_backend(choice):
        got = run(ours, "gate_residual_adaln", data, "layernorm")
    assert_close(got, run(exact, "gate_residual_adaln", data, "layernorm"), 1e-13)


def test_reference_gradients_agree_with_finite_differences() -> None:
    leaves = [v.requires_grad_() for v in make(2, 4, 7, torch.float64, bias=True).values()]

    def function(x: Tensor, h: Tensor, mod: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(packed("gate_residual_adaln", x, h, mod, "rmsnorm", bias))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strided_and_mixed_inputs(dtype: torch.dtype) -> None:
    data = make(2, 70, 64, dtype)
    x = data["x"].transpose(0, 1).contiguous().transpose(0, 1)
    h = torch.stack([data["h"], data["h"]], -1)[..., 0]
    assert not x.is_contiguous() and h.stride(-1) == 2
    strided = {"x": x, "h": h, "mod": data["mod"].float()}
    dense = {"x": data["x"], "h": data["h"], "mod": data["mod"].float()}
    got = run_with_views(strided)
    want = run_with_views(dense)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    wide = {k: v.double() for k, v in dense.items()}
    assert_close(got, run(exact, "gate_residual_adaln", wide, "layernorm"), RATIO[dtype])


def run_with_views(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Like `run`, but keeping the strides of the inputs."""
    leaves = {k: v.detach().requires_grad_() for k, v in data.items()}
    outputs = ours("gate_residual_adaln", leaves["x"], leaves["h"], leaves["mod"], "layernorm")
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outputs]
    sum(
        (o * w.to(o.dtype)).double().sum() for o, w in zip(outputs, weights, strict=True)
    ).backward()
    made = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    return made | {f"d{k}": v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual", "gate_residual_adaln"])
def test_zero_size(op: str, shape: tuple[int, int, int]) -> None:
    got = run(ours, op, make(*shape, torch.float32, bias="gate" in op), "layernorm")
    if "gate" in op:
        assert torch.equal(got["dbias"], torch.zeros(shape[2]))
    assert got["output0"].shape == shape
    used = got["dmod"]
    assert used.shape == (shape[0], 3 * shape[2]) and torch.equal(used, torch.zeros_like(used))


@needs_cpp
def test_bits_do_not_depend_on_threads_or_repetition() -> None:
    data = make(3, 200, 199, torch.float32, bias=True)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            # Only the operator is under test: the loss's own sums depend on the thread count.
            leaves = [v.clone().requires_grad_() for v in data.values()]
            x, h, mod, bias = leaves
            out, y = ours("gate_residual_adaln", x, h, mod, "layernorm", bias)
            grads = torch.autograd.grad([out, y], leaves, [data["h"], data["x"]])
            runs.append([out.detach(), y.detach(), *grads])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("level", backends.cpp().levels() if backends.HAS_CPP else [])
def test_every_processor_level(level: str) -> None:
    data = make(2, 70, 199, torch.bfloat16, bias=True)
    before = backends.cpp().set_level(level)
    try:
        got = run(ours, "gate_residual_adaln", data, "layernorm")
    finally:
        backends.cpp().set_level(before)
    want = run(exact, "gate_residual_adaln", {k: v.double() for k, v in data.items()}, "layernorm")
    assert_close(got, want, RATIO[torch.bfloat16])


@needs_cpp
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    x = torch.randn(1, 64, 256).bfloat16()
    h = torch.randn(1, 64, 256).bfloat16()
    gate = torch.randn(1, 256).bfloat16()
    x[0, 0, 0], h[0, 0, 1], x[0, 0, 2] = float("nan"), float("inf"), 3.3e38
    with kernels.use_backend("cpp"):
        got = kernels.gate_residual(x, h, gate)
    want = kernels.gate_residual_reference(x, h, gate)
    assert got[0, 0, 0].isnan() and want[0, 0, 0].isnan()
    ulp = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    ulp[0, 0, 0] = 0
    # A fused multiply-add may round once where two operations round twice.
    assert int(ulp.max()) <= 1 and float((ulp > 0).float().mean()) < 1e-3


@needs_cpp
@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual", "gate_residual_adaln"])
def test_compiles_without_a_break(op: str) -> None:
    data = make(2, 20, 64, torch.float32)
    torch._dynamo.reset()
    form = ours if op == "gate_residual" else packed
    compiled = torch.compile(
        lambda x, h, m: form(op, x, h, m, "layernorm"), fullgraph=True, backend="aot_eager"
    )
    got = run(lambda op, x, h, mod, norm: compiled(x, h, mod), op, data, "layernorm")
    want = run(form, op, data, "layernorm")
    assert_close(got, want, 1e-6)


@needs_cpp
def test_operators_keep_the_rules_of_torch_library() -> None:
    data = make(2, 5, 8, torch.float32)
    gate, shift, scale = (t.detach().requires_grad_() for t in data["mod"].chunk(3, 1))
    x, h = data["x"].requires_grad_(), data["h"].requires_grad_()
    ops = torch.ops.etude
    torch.library.opcheck(adaln.ops.adaln_modulate.default, (x, shift, scale, 1e-6, False, None))
    mod, bias = data["mod"].requires_grad_(), torch.ones(8, requires_grad=True)
    pair = data["mod"][:, :16].detach().requires_grad_()
    torch.library.opcheck(ops.adaln_modulate_packed.default, (x, pair, 1e-6, False, None))
    for given in (None, bias):
        torch.library.opcheck(ops.gate_residual.default, (x, h, gate, given))
    both = (x, h, gate, shift, scale, None, 1e-6, True, torch.bfloat16)
    torch.library.opcheck(ops.gate_residual_adaln.default, both)
    both = (x, h, mod, bias, 1e-6, False, None)
    torch.library.opcheck(ops.gate_residual_adaln_packed.default, both)


@pytest.mark.parametrize("choice", CHOICES)
def test_autocast_gives_the_next_matmul_its_dtype(choice: str) -> None:
    data = make(2, 9, 63, torch.float32)
    with kernels.use_backend(choice), torch.autocast("cpu", torch.bfloat16):
        got = run(ours, "gate_residual_adaln", data, "layernorm")
    assert got["output0"].dtype == torch.float32 and got["output1"].dtype == torch.bfloat16
    want = run(exact, "gate_residual_adaln", {k: v.double() for k, v in data.items()}, "layernorm")
    assert_close(got, want, RATIO[torch.bfloat16])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 8)}, "x must be (B, N, D), got (4, 8)"),
        ({"shift": torch.zeros(2, 7)}, "shift must be (2, 8), got (2, 7)"),
        ({"scale": torch.zeros(2, 8, dtype=torch.int32)}, "torch.int32"),
        ({"scale": torch.zeros(2, 8).double()}, "shift, scale must have one dtype"),
        ({"norm": "batchnorm"}, "use layernorm or rmsnorm"),
        ({"modulation": torch.zeros(2, 16)}, "modulation takes the place of shift, scale"),
        ({"scale": None}, "scale missing"),
        (
            {"modulation": torch.zeros(2, 8), "shift": None, "scale": None},
            "modulation must be (2, 16), got (2, 8)",
        ),
    ],
)
def test_bad_input_gets_one_sentence(change: dict, words: str) -> None:
    good = {"x": torch.zeros(2, 4, 8), "shift": torch.zeros(2, 8), "scale": torch.zeros(2, 8)}
    with pytest.raises(ValueError) as caught:
        kernels.adaln_modulate(**(good | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_bias_of_another_width_gets_one_sentence() -> None:
    x, vector = torch.zeros(2, 4, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"gate_residual: bias must be \(8,\), got \(2, 8\)"):
        kernels.gate_residual(x, x, vector, bias=vector)
