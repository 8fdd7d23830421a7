"""GroupNorm with SiLU: C++ and reference against float64, in both memory layouts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from etude import kernels
from etude.kernels import backends, groupnorm

pytestmark = pytest.mark.usefixtures("poisoned_empty")

# RMS of the error over RMS of the value. float32: x has a mean of three deviations, whose rounding
# alone leaves 3 * 2^-24 in normed; sums of up to 1200 terms. bfloat16, float16: half a unit in the
# last place per rounding of an output, more of few numbers that are far from the next power of two.
RATIO = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")
LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}
# (B, C, H, W), groups: 72 channels of 3, one channel per group, one group, one position, odd sizes.
SHAPES = [
    ((2, 72, 5, 13), 24),
    ((1, 64, 20, 17), 64),
    ((3, 10, 3, 3), 1),
    ((2, 320, 1, 1), 32),
    ((1, 128, 16, 75), 32),
]


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "last") -> dict[str, Tensor]:
    """x with a mean far from zero that differs between channels."""
    g = torch.Generator().manual_seed(0)
    C = shape[1]
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 6
    x += torch.randn(1, C, 1, 1, generator=g, dtype=torch.float64)
    weight = 1 + torch.randn(C, generator=g, dtype=torch.float64) / 2
    bias = torch.randn(C, generator=g, dtype=torch.float64)
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return {"x": x, "weight": weight.to(dtype), "bias": bias.to(dtype)}


def exact(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True) -> Tensor:
    """The operator by its definition, in the dtype of x."""
    B, C = x.shape[:2]
    parts = x.reshape(B, groups, -1)
    centred = parts - parts.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
    v = normed.reshape(x.shape) * weight.view(C, 1, 1) + bias.view(C, 1, 1)
    return v / (1 + torch.exp(-v)) if silu else v


def ours(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = True) -> Tensor:
    return kernels.groupnorm_silu(x, groups, weight, bias, silu=silu)


def run(function, data: dict[str, Tensor], groups: int, silu: bool = True) -> dict[str, Tensor]:
    """Output and gradients, for a loss that weighs every output element differently."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in data.items()}
    y = function(*leaves.values(), groups, silu)
    g = torch.Generator().manual_seed(9)
    weights = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    (y * weights).double().sum().backward()
    return {"y": y.detach()} | {f"d{k}": v.grad for k, v in leaves.items()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name].double() - want[name].double()).square().mean().sqrt()
        size = want[name].double().square().mean().sqrt()
        # One position per group, or few: dx nearly cancels, hence the absolute floor.
        assert error <= ratio * max(float(size), 0.1), f"{name}: {float(error / size):.2e}"


def wide(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in data.items()}


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        pytest.param("cpp", torch.float32, marks=needs_cpp, id="cpp-float32"),
        pytest.param("cpp", torch.bfloat16, marks=needs_cpp, id="cpp-bfloat16"),
        pytest.param("reference", torch.float32, id="reference-float32"),
        pytest.param("reference", torch.float16, id="reference-float16"),
    ],
)
def test_forward_and_backward(shape, groups, silu, layout, choice, dtype) -> None:
    data = make(shape, dtype, layout)
    with kernels.use_backend(choice):
        got = run(ours, data, groups, silu)
    assert got["y"].dtype == dtype
    if choice == "cpp":
        assert got["y"].is_contiguous(memory_format=LAYOUTS[layout])
    assert_close(got, run(exact, wide(data), groups, silu), RATIO[dtype])


def test_the_same_as_torch() -> None:
    data = make((2, 64, 7, 9), torch.float32)

    def peer(x, weight, bias, groups, silu):
        return F.silu(F.group_norm(x, groups, weight, bias))

    assert_close(run(ours, data, 32), run(peer, data, 32), 2e-6)


@needs_cpp
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_large_mean_does_not_cost_the_variance(layout: str) -> None:
    """E[x^2] - E[x]^2 in float32 would lose all digits of a variance of 1 beside a mean of 4096."""
    data = make((1, 8, 40, 40), torch.float32, layout)
    data["x"] = data["x"] + 4096
    for outlier, bound in ((0, 2.0**-11), (1000, 3e-3)):
        # A mean of 4096 that is off by half a unit in its last place, 2^-12, shifts everything by
        # that. An outlier in the place of a run's origin: 141 deviations, of 2e-5 relative error.
        data["x"][0, 0, 0, 0] += outlier
        with kernels.use_backend("cpp"):
            got = kernels.groupnorm_silu(data["x"], 2, data["weight"], data["bias"])
        want = exact(**wide(data), groups=2)
        assert float((got.double() - want).abs().max()) < bound


@pytest.mark.parametrize("choice", CHOICES)
def test_float64_stays_float64(choice: str) -> None:
    data = make((2, 12, 3, 5), torch.float64)
    with kernels.use_backend(choice):
        got = run(ours, data, 4)
    assert_close(got, run(exact, data, 4), 1e-12)


def test_the_reference_agrees_with_finite_differences() -> None:
    data = {k: v.requires_grad_() for k, v in make((2, 6, 2, 3), torch.float64).items()}
    x, weight, bias = data.values()
    assert torch.autograd.gradcheck(
        lambda x, w, b: kernels.groupnorm_silu_reference(x, 3, w, b), [x, weight, bias]
    )


@needs_cpp
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_wider_tensors(layout: str, dtype: torch.dtype) -> None:
    """Chunks along the channels, rows along the height, gradients of another layout."""
    x = make((2, 48, 18, 20), dtype, layout)["x"]
    weight, bias = torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    for view in (x.chunk(2, 1)[1], x[:, :24, 2:], x[:, 24:, :, 3:]):
        dense = view.contiguous(memory_format=LAYOUTS[layout])
        leaves = [view.detach().requires_grad_(), dense.detach().requires_grad_()]
        other = torch.randn(view.shape).to(dtype)
        made = []
        with kernels.use_backend("cpp"):
            for leaf in leaves:
                y = kernels.groupnorm_silu(leaf, 8, weight, bias)
                made.append((y, *torch.autograd.grad(y, leaf, other)))
        want = run(
            lambda x, w, b, g, s: exact(x, w, b, g),
            wide({"x": view, "weight": weight, "bias": bias}),
            8,
        )
        for y, _ in made:
            assert_close({"y": y.detach()}, {"y": want["y"]}, RATIO[dtype])
        if groupnorm.is_channels_last(view) == groupnorm.is_channels_last(dense):
            assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(2, 8, 4, 6).to(memory_format=torch.channels_last), True),
        (torch.zeros(2, 8, 4, 6).to(memory_format=torch.channels_last)[:, 2:4], True),
        (torch.zeros(2, 8, 4, 6).to(memory_format=torch.channels_last)[:, :, :2], True),
        (torch.zeros(2, 8, 4, 6).to(memory_format=torch.channels_last)[:, :, :, :2], False),
        (torch.zeros(2, 8, 4, 6), False),
        (torch.zeros(2, 8, 1, 1), True),
        (torch.zeros(2, 1, 4, 6), True),
        (torch.zeros(2, 8, 1, 1).expand(2, 8, 4, 6), False),
    ],
)
def test_what_counts_as_channels_last(tensor: Tensor, expected: bool) -> None:
    assert groupnorm.is_channels_last(tensor) == expected


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
def test_zero_size(shape: tuple[int, ...], choice: str) -> None:
    x = torch.zeros(shape).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)
    with kernels.use_backend(choice):
        y = kernels.groupnorm_silu(x, 4, weight, bias)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(8)) and torch.equal(bias.grad, torch.zeros(8))


@needs_cpp
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_bits_do_not_depend_on_threads_or_repetition(layout: str, batch: int) -> None:
    """Both ways of sharing the work: whole pictures, and parts of one."""
    data = make((batch, 24, 17, 19), torch.float32, layout)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [v.clone().requires_grad_() for v in data.values()]
            y = ours(*leaves, 8)
            runs.append([y.detach(), *torch.autograd.grad(y, leaves, data["x"])])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("level", backends.cpp().levels() if backends.HAS_CPP else [])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_processor_level(level: str, layout: str) -> None:
    data = make((2, 72, 17, 19), torch.float32, layout)
    before = backends.cpp().set_level(level)
    try:
        got = run(ours, data, 24)
    finally:
        backends.cpp().set_level(before)
    assert_close(got, run(exact, wide(data), 24), RATIO[torch.float32])


@needs_cpp
def test_silu_far_from_zero_and_nan() -> None:
    x = torch.tensor([-1.0, 1.0]).repeat(32).view(1, 1, 8, 8)
    one = torch.ones(1)
    with kernels.use_backend("cpp"):
        for size in (30.0, 80.0, 1e4, 1e30):
            y = kernels.groupnorm_silu(x, 1, one * size, one * 0)
            assert float(y.max()) == pytest.approx(size, rel=1e-4)
            assert -1e-11 < float(y.min()) <= 0 or size == 1e30
        x[0, 0, 0, 0] = float("nan")
        assert bool(kernels.groupnorm_silu(x, 1, one, one).isnan().all())


@needs_cpp
def test_compiles_without_a_break() -> None:
    data = make((2, 64, 5, 4), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, data, 32), run(ours, data, 32), 1e-6)


@needs_cpp
@pytest.mark.parametrize("last", [True, False])
def test_operators_keep_the_rules_of_torch_library(last: bool) -> None:
    shape = (2, 12, 8) if last else (2, 8, 12)
    leaves = [torch.randn(s, requires_grad=True) for s in (shape, (8,), (8,))]
    arguments = (*leaves, 4, 1e-5, True, last, torch.bfloat16 if last else None)
    torch.library.opcheck(torch.ops.etude.groupnorm_silu.default, arguments)


@needs_cpp
def test_second_derivatives_raise() -> None:
    data = make((1, 8, 4, 4), torch.float32)
    leaves = [v.requires_grad_() for v in data.values()]
    grad = torch.autograd.grad(ours(*leaves, 4).sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("choice", CHOICES)
def test_autocast_gives_the_next_convolution_its_dtype(choice: str) -> None:
    data = make((2, 64, 5, 4), torch.float32)
    with kernels.use_backend(choice), torch.autocast("cpu", torch.bfloat16):
        got = run(ours, data, 32)
    assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == torch.float32
    assert_close(got, run(exact, wide(data), 32), RATIO[torch.bfloat16])


@needs_cpp
def test_checkpointing_gives_the_same_gradients() -> None:
    data = make((2, 64, 5, 4), torch.float32)
    plain = run(ours, data, 32)
    again = run(lambda *t: checkpoint(ours, *t, use_reentrant=False), data, 32)
    assert all(torch.equal(plain[k], again[k]) for k in plain)


@needs_cpp
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_verification_accepts_right_and_finds_wrong(layout, monkeypatch) -> None:
    data = make((2, 24, 17, 19), torch.float32, layout)
    with kernels.use_backend("cpp", verify=True):
        run(ours, data, 8)
        right = groupnorm.backward_reference
        monkeypatch.setattr(
            groupnorm, "backward_reference", lambda *a: (right(*a)[0] * 1.01, *right(*a)[1:])
        )
        with pytest.raises(AssertionError, match="backward: output dx"):
            run(ours, data, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 8)}, "x must be (B, C, H, W), got (4, 8)"),
        ({"num_groups": 3}, "3 groups do not divide 8 channels"),
        ({"weight": torch.zeros(7)}, "weight must be (8,), got (7,)"),
        ({"bias": torch.zeros(8, dtype=torch.int32)}, "torch.int32"),
    ],
)
def test_bad_input_gets_one_sentence(change: dict, words: str) -> None:
    good = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(8), "bias": torch.zeros(8)}
    with pytest.raises(ValueError) as caught:
        kernels.groupnorm_silu(**({"num_groups": 4} | good | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
