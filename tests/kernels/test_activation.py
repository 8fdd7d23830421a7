"""Bias with GELU, SwiGLU and the MLP: C++ and reference against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from etude import kernels
from etude.kernels import activation, backends

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# RMS of the error over RMS of the value. float32: a few roundings per element, sums of up to 200
# terms. bfloat16 and float16: half a unit in the last place (2^-9, 2^-12) per rounding; the output
# is rounded once, dbias too, and a product's hidden layer once more on the way.
RATIO = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")
FORMS = ("tanh", "none")
OPS = ("bias_gelu tanh", "bias_gelu none", "gelu tanh", "swiglu", "swiglu two")


def make(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """x = [x0 | x1] of two times `width` columns, and a bias."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2 * width, generator=g, dtype=torch.float64) * 2
    bias = torch.randn(width, generator=g, dtype=torch.float64)
    return {"x": x.to(dtype), "bias": bias.to(dtype)}


def exact(op: str, x: Tensor, bias: Tensor) -> Tensor:
    """The operator by other means than the reference's, in the dtype of x."""
    name, _, form = op.partition(" ")
    a, b = x.chunk(2, -1)
    if name == "swiglu":
        return a / (1 + torch.exp(-a)) * b
    z = b + bias if name == "bias_gelu" else b
    if form == "none":
        return z * torch.special.ndtr(z)
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def ours(op: str, x: Tensor, bias: Tensor) -> Tensor:
    """The same by the public functions; GELU takes a slice of x, whose rows are strided."""
    name, _, form = op.partition(" ")
    a, b = x.chunk(2, -1)
    if op == "swiglu":
        return kernels.swiglu(x)
    if op == "swiglu two":
        return kernels.swiglu(a, b)
    return kernels.bias_gelu(b, bias if name == "bias_gelu" else None, form)


def run(function, op: str, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients, for a loss that weighs every output element differently."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in data.items()}
    y = function(op, *leaves.values())
    g = torch.Generator().manual_seed(9)
    weights = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    (y * weights).double().sum().backward()
    made = {"y": y.detach()}
    return made | {f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).square().mean().sqrt()
        size = want[name].double().square().mean().sqrt()
        assert error <= ratio * size + 1e-12, f"{name}: error ratio {float(error / size):.2e}"


def wide(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in data.items()}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(70, 63), (3, 1152), (130, 128), (1, 1), (2, 4097)], ids=str)
@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        pytest.param("cpp", torch.float32, marks=needs_cpp, id="cpp-float32"),
        pytest.param("cpp", torch.bfloat16, marks=needs_cpp, id="cpp-bfloat16"),
        pytest.param("reference", torch.float32, id="reference-float32"),
        pytest.param("reference", torch.float16, id="reference-float16"),
    ],
)
def test_forward_and_backward(op: str, shape, choice: str, dtype: torch.dtype) -> None:
    data = make(*shape, dtype)
    with kernels.use_backend(choice):
        got = run(ours, op, data)
    assert got["y"].dtype == dtype
    # A single number in the left tail of the erf form is small beside its terms: a looser bound.
    assert_close(got, run(exact, op, wide(data)), RATIO[dtype] * (20 if shape == (1, 1) else 1))


@needs_cpp
@pytest.mark.parametrize("level", backends.cpp().levels() if backends.HAS_CPP else [])
def test_errors_in_units_of_the_last_place(level: str) -> None:
    """Against float64 over the whole range of float32, at every processor level.

    tanh form and SiLU: at most 4 units in the last place, also where the result is almost
    subnormal. erf form: 4 * 2^-24 of |z|. Slopes: 5 * 2^-24.
    """
    z = torch.cat(
        [torch.linspace(-110, 110, 60000), torch.linspace(-12, 12, 60000)]
        + [sign * torch.logspace(-38, 38, 5000) for sign in (1, -1)]
    )
    w = z.double()
    u = math.sqrt(8 / math.pi) * (w + 0.044715 * w**3)
    ulp = 2.0**-149
    before = backends.cpp().set_level(level)
    try:
        with kernels.use_backend("cpp"):
            for want, got in (
                (w * torch.sigmoid(u), kernels.bias_gelu(z, None)),
                (w * torch.sigmoid(w), kernels.swiglu(z, torch.ones_like(z))),
            ):
                spacing = (torch.frexp(want)[1] - 24).double().exp2().clamp(min=ulp)
                error = (got.double() - want).abs() / spacing
                normal = want.abs() > 2.0**-126
                assert float(error[normal].max()) <= 4
                assert float((got.double() - want).abs()[~normal].max()) <= 4 * 2.0**-149
            got = kernels.bias_gelu(z, None, "none")
            want = w * torch.special.ndtr(w)
            assert bool(((got.double() - want).abs() <= 4 * 2.0**-24 * w.abs()).all())
            for form in FORMS:
                leaf, other = z.clone().requires_grad_(), z.clamp(-1e4, 1e4).double()
                slope = torch.autograd.grad(kernels.bias_gelu(leaf, None, form).sum(), leaf)[0]
                other.requires_grad_()
                y = F.gelu(other, approximate=form).sum()
                want = torch.autograd.grad(y, other)[0]
                assert float((slope.double() - want).abs().max()) <= 5 * 2.0**-24
    finally:
        backends.cpp().set_level(before)


@needs_cpp
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_show(form: str) -> None:
    x = torch.tensor([math.nan, math.inf, 1.0]).requires_grad_()
    with kernels.use_backend("cpp"):
        y = kernels.bias_gelu(x, None, form)
        y.sum().backward()
    assert y[0].isnan() and y[1] == math.inf and x.grad[0].isnan() and x.grad[2] > 1


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("op", OPS)
def test_float64_stays_float64(choice: str, op: str) -> None:
    data = make(5, 63, torch.float64)
    with kernels.use_backend(choice):
        got = run(ours, op, data)
    assert_close(got, run(exact, op, data), 1e-13)


def test_references_agree_with_finite_differences() -> None:
    x, bias = make(3, 5, torch.float64).values()
    w1, w2, b2 = (torch.randn(s, dtype=torch.float64) for s in ((5, 10), (4, 5), (4,)))
    leaves = [t.requires_grad_() for t in (x, w1, bias, w2, b2)]
    assert torch.autograd.gradcheck(kernels.mlp_reference, leaves)
    assert torch.autograd.gradcheck(lambda x: kernels.swiglu_reference(x), [x])
    for form in FORMS:
        assert torch.autograd.gradcheck(
            lambda x, b, form=form: kernels.bias_gelu_reference(x[:, :5], b, form), [x, bias]
        )


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
def test_zero_size(shape: tuple[int, ...], choice: str) -> None:
    x, bias = torch.zeros(shape, requires_grad=True), torch.ones(shape[-1], requires_grad=True)
    with kernels.use_backend(choice):
        y = kernels.bias_gelu(x, bias)
        both = kernels.swiglu(x)
    assert y.shape == shape and both.shape == (*shape[:-1], shape[-1] // 2)
    (y.sum() + both.sum()).backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias)) and x.grad.shape == shape


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_change_the_values(dtype: torch.dtype) -> None:
    x = make(60, 64, dtype)["x"].view(4, 15, 128)
    bias = torch.randn(128)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack([x, x], -1)[..., 0]
    with kernels.use_backend("cpp"):
        for other in (transposed, spread):
            assert torch.equal(kernels.bias_gelu(other, bias), kernels.bias_gelu(x, bias))
            assert torch.equal(kernels.swiglu(other), kernels.swiglu(x))
        leaf = x.clone().requires_grad_()
        grads = [
            torch.autograd.grad(kernels.bias_gelu(leaf, bias), leaf, dy)[0]
            for dy in (transposed, x, spread)
        ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[2], grads[1])


@needs_cpp
def test_bits_do_not_depend_on_threads_or_repetition() -> None:
    data = make(300, 199, torch.float32)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [v.clone().requires_grad_() for v in data.values()]
            outputs = [ours(op, *leaves) for op in ("bias_gelu tanh", "swiglu")]
            runs.append([*outputs, *torch.autograd.grad(outputs, leaves, outputs)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_cpp
def test_a_frozen_bias_gets_no_gradient_and_dx_stays() -> None:
    x, bias = make(70, 9, torch.float32).values()
    x = x[:, :9].clone().requires_grad_()
    with_bias = torch.autograd.grad(kernels.bias_gelu(x, bias.clone().requires_grad_()).sum(), x)
    frozen = torch.autograd.grad(kernels.bias_gelu(x, bias).sum(), x)
    assert torch.equal(with_bias[0], frozen[0])


@needs_cpp
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_break(op: str) -> None:
    data = make(20, 64, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, b: ours(op, x, b), fullgraph=True, backend="aot_eager")
    got = run(lambda op, x, b: compiled(x, b), op, data)
    assert_close(got, run(ours, op, data), 1e-6)


@needs_cpp
def test_operators_keep_the_rules_of_torch_library() -> None:
    x, bias = (t.requires_grad_() for t in make(5, 4, torch.float32).values())
    x8 = x.detach()[:, :4].clone().requires_grad_()
    check = torch.library.opcheck
    check(torch.ops.etude.bias_gelu.default, (x8, bias, True, None))
    check(torch.ops.etude.bias_gelu.default, (x, None, False, torch.bfloat16))
    check(torch.ops.etude.swiglu.default, (x, None, None))
    check(torch.ops.etude.swiglu.default, (x, x.detach().clone().requires_grad_(), None))


@needs_cpp
def test_second_derivatives_raise() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    for y in (kernels.bias_gelu(x, None), kernels.swiglu(x)):
        grad = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad.sum().backward()


@pytest.mark.parametrize("choice", CHOICES)
def test_autocast_gives_the_next_matmul_its_dtype(choice: str) -> None:
    data = make(9, 63, torch.float32)
    with kernels.use_backend(choice), torch.autocast("cpu", torch.bfloat16):
        for op in OPS:
            got = run(ours, op, data)
            assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == torch.float32
            assert_close(got, run(exact, op, wide(data)), RATIO[torch.bfloat16])


@needs_cpp
def test_checkpointing_gives_the_same_gradients() -> None:
    data = make(20, 64, torch.float32)
    plain = run(ours, "bias_gelu tanh", data)
    again = run(
        lambda op, x, b: checkpoint(lambda *t: ours(op, *t), x, b, use_reentrant=False),
        "bias_gelu tanh",
        data,
    )
    assert all(torch.equal(plain[k], again[k]) for k in plain)


@needs_cpp
def test_verification_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with kernels.use_backend("cpp", verify=True):
        kernels.bias_gelu(x, bias).sum().backward()
        kernels.swiglu(x).sum().backward()
        wrong = lambda x, bias, form, out_dtype: -x.detach()  # noqa: E731
        monkeypatch.setattr(activation, "bias_gelu_reference", wrong)
        with pytest.raises(AssertionError, match="C.. bias_gelu: output y"):
            kernels.bias_gelu(x, bias)


# The product's own rounding, of 16-bit hidden values, dominates: bounds of RATIO.
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [True, False])
def test_mlp_and_linear_gelu(choice: str, dtype: torch.dtype, form: str, biased: bool) -> None:
    g = torch.Generator().manual_seed(3)
    shapes = {"x": (2, 33, 72), "w1": (199, 72), "b1": (199,), "w2": (64, 199), "b2": (64,)}
    data = {
        k: (torch.randn(s, generator=g, dtype=torch.float64) / max(1, s[-1]) ** 0.5).to(dtype)
        for k, s in shapes.items()
        if biased or not k.startswith("b")
    }

    def call(op: str, *tensors: Tensor) -> Tensor:
        named = {"b1": None, "b2": None} | dict(zip(data, tensors, strict=True))
        if op == "ours":
            return kernels.mlp(*(named[k] for k in shapes), form)
        if op == "hidden":
            return kernels.linear_gelu(named["x"], named["w1"], named["b1"], form)
        hidden = named["x"] @ named["w1"].T + (named["b1"] if biased else 0)
        hidden = F.gelu(hidden, approximate=form)
        if op == "exact hidden":
            return hidden
        return hidden @ named["w2"].T + (named["b2"] if biased else 0)

    with kernels.use_backend(choice):
        got, hidden = run(call, "ours", data), run(call, "hidden", data)
    ratio = RATIO[dtype] * 2
    assert_close(got, run(call, "exact", wide(data)), ratio)
    assert_close(hidden, run(call, "exact hidden", wide(data)), ratio)


def test_plans_are_chosen_by_the_operator_s_own_names() -> None:
    bf16 = torch.bfloat16
    assert activation.PLANS == ("split", "epilogue", "library")
    for name in ("auto", "triton", "cpp"):
        with kernels.use_backend(name):
            assert activation.plan("mlp", bf16) == "split"
    for name in activation.PLANS:
        with kernels.use_backend("auto"), kernels.use_backend(name, op="mlp"):
            assert activation.plan("mlp", bf16) == activation.plan("mlp", torch.float16) == name
            assert activation.plan("mlp", torch.float32) == "split"
            assert activation.plan("linear_gelu", bf16) == "split"


@needs_cpp
def test_a_plan_that_needs_triton_is_refused_on_the_cpu_and_split_is_not() -> None:
    if torch.cuda.is_available() or backends.interpreting():
        pytest.skip("Triton runs here")
    x, w = torch.randn(2, 8), torch.randn(8, 8)
    calls = {"mlp": lambda: kernels.mlp(x, w, None, w, None)}
    calls["linear_gelu"] = lambda: kernels.linear_gelu(x, w, None)
    for op, call in calls.items():
        want = call()
        with kernels.use_backend("split", op=op):
            assert backends.pick(op, "cpu", torch.float32) == "cpp"
            assert torch.equal(call(), want)
        for name in ("epilogue", "library"):
            refused = pytest.raises(RuntimeError, match=f"ETUDE_KERNELS={op}={name}: no CUDA")
            with kernels.use_backend(name, op=op), refused:
                call()


def test_library_is_the_plan_of_inference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each plan calls, as if these tensors were on a GPU."""
    made = []
    fused = torch.ops.aten._addmm_activation

    def counted(*arguments, **options) -> Tensor:
        made.append(1)
        return fused(*arguments, **options)

    monkeypatch.setattr(torch.ops.aten, "_addmm_activation", counted)
    monkeypatch.setattr(activation, "_linear_check", lambda *_: "triton")
    x, w, b = (torch.randn(s, dtype=torch.bfloat16) for s in ((4, 8), (8, 8), (8,)))
    want = kernels.mlp_reference(x.float(), w.float(), b.float(), w.float(), b.float())
    with kernels.use_backend("auto"), kernels.use_backend("library", op="mlp"):
        torch.testing.assert_close(kernels.mlp(x, w, b, w, b).float(), want, rtol=0.05, atol=0.05)
        assert len(made) == 1
        kernels.linear_gelu(x, w, b)  # has a choice of its own
        kernels.mlp(x, w, b, w, b, "none")
        kernels.mlp(x, w.clone().requires_grad_(), b, w, b)
        assert len(made) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kernels.bias_gelu(torch.zeros(2, 8), torch.zeros(7)), "bias must be (8,)"),
        (lambda: kernels.bias_gelu(torch.zeros(2, 8).int(), None), "torch.int32"),
        (lambda: kernels.bias_gelu(torch.zeros(2, 8), None, "erf"), "use tanh or none"),
        (lambda: kernels.bias_gelu(torch.zeros(()), None), "at least one dimension"),
        (lambda: kernels.swiglu(torch.zeros(2, 7)), "an even last dimension, got (2, 7)"),
        (lambda: kernels.swiglu(torch.zeros(2, 8), torch.zeros(2, 4)), "value must be (2, 8)"),
        (lambda: kernels.swiglu(torch.zeros(2), torch.zeros(2).double()), "must have one dtype"),
        (
            lambda: kernels.mlp(*(torch.zeros(s) for s in ((2, 8), (9, 8), (9,), (8, 7), (8,)))),
            "the second weight must be (8, 9), got (8, 7)",
        ),
        (
            lambda: kernels.linear_gelu(torch.zeros(2, 8), torch.zeros(9, 7), None),
            "the first weight must be (9, 8), got (9, 7)",
        ),
        (
            lambda: kernels.linear_gelu(torch.zeros(2, 8), torch.zeros(9, 8), None, "erf"),
            "use tanh or none",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
