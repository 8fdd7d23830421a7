"""One step of a sampler, and bytes: C++ and reference against closed forms in float64."""

import math

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, solver

pytestmark = pytest.mark.usefixtures("poisoned_empty")
needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")
# RMS of the error over RMS of the value: a dozen float32 roundings, of which guidance by a weight
# of 3 lets one count seven times. Inputs of 16 bits are exact; outputs are float32 in every case.
RATIO = 2e-6
SHAPES = [(3, 4, 8, 8), (2, 4, 32, 36), (2, 3, 5, 7), (5, 1), (1, 2, 2100), (1, 1, 1, 1)]
SCALES = (0, 1, 2)
# From (alpha, sigma) to the next point, and the point before: variance preserving.
POINTS = (0.6, 0.8), (0.8, 0.6), (0.28, 0.96)


def make(shape: tuple[int, ...], scales: int, dtype=torch.float32) -> dict[str, Tensor]:
    """x, predictions of a learned-sigma network under every condition, weights, and an extra."""
    g = torch.Generator().manual_seed(sum(shape) + scales)
    count = shape[0]
    blocks = ((scales + 1) * count, 2 * shape[1], *shape[2:])
    made = {
        "x": torch.randn(shape, generator=g),
        "prediction": torch.randn(blocks, generator=g).to(dtype),
        "extra": torch.randn(shape, generator=g),
    }
    return made | ({"guidance": torch.rand(count, scales, generator=g) * 3} if scales else {})


def exact(
    data: dict[str, Tensor], method: str, prediction: str, channels: int | None
) -> tuple[Tensor, Tensor]:
    """(x', x0) in float64, rule by rule, with numbers instead of rows."""
    (alpha, sigma), (alpha_next, sigma_next), (alpha_before, sigma_before) = POINTS
    x = data["x"].double()
    parts = data["prediction"].double()[:, : x.shape[1]].split(len(x))
    p = parts[0].clone()
    for k in range(len(parts) - 1):
        weight = data["guidance"].double()[:, k].view(-1, *[1] * (x.dim() - 1))
        p[:, :channels] += (weight * (parts[k] - parts[k + 1]))[:, :channels]
    if prediction == "eps":
        x0 = (x - sigma * p) / alpha
    elif prediction == "x0":
        x0 = p
    elif prediction == "flow":  # p = eps - x0 and x = alpha x0 + sigma eps
        x0 = (x - sigma * p) / (alpha + sigma)
    else:
        x0 = alpha * x - sigma * p
    eps = (x - alpha * x0) / sigma
    if method == "ddim":
        return alpha_next * x0 + sigma_next * eps, x0
    if method == "ddpm":
        ratio = alpha / alpha_next
        beta = sigma**2 - ratio**2 * sigma_next**2
        mean = alpha_next * beta / sigma**2 * x0 + ratio * sigma_next**2 / sigma**2 * x
        return mean + math.sqrt(beta) * sigma_next / sigma * data["extra"].double(), x0

    def log_ratio(a: float, s: float) -> float:
        return math.log(a / s)

    h = log_ratio(alpha_next, sigma_next) - log_ratio(alpha, sigma)
    r = (log_ratio(alpha, sigma) - log_ratio(alpha_before, sigma_before)) / h
    drift = (1 + 0.5 / r) * x0 - 0.5 / r * data["extra"].double()
    return sigma_next / sigma * x - alpha_next * math.expm1(-h) * drift, x0


def table(method: str, prediction: str, rows: int | None = None) -> Tensor:
    now, then, before = (torch.tensor(point, dtype=torch.float64).unbind() for point in POINTS)
    made = solver.solver_coefficients(
        method, prediction, *now, *then, alpha_previous=before[0], sigma_previous=before[1]
    )
    return made if rows is None else made.expand(rows, 8)


def ours(
    data: dict[str, Tensor],
    method: str,
    prediction: str,
    channels: int | None,
    *,
    rows: bool = True,
) -> tuple[Tensor, Tensor]:
    more = {"guidance": data["guidance"], "guided_channels": channels} if "guidance" in data else {}
    coefficients = table(method, prediction, len(data["x"]) if rows else None).contiguous()
    extra = None if method == "ddim" else data["extra"]
    return kernels.solver_step(data["x"], data["prediction"], coefficients, extra=extra, **more)


def assert_close(got, want, ratio: float = RATIO) -> None:
    for name, a, b in zip(("x", "x0"), got, want, strict=True):
        error, size = ((t.double()).square().mean().sqrt() for t in (a - b, b))
        assert error <= ratio * size + 1e-12, f"{name}: error ratio {float(error / size):.2e}"


BACKENDS = [
    pytest.param("cpp", torch.float32, marks=needs_cpp, id="cpp-float32"),
    pytest.param("cpp", torch.bfloat16, marks=needs_cpp, id="cpp-bfloat16"),
    pytest.param("reference", torch.float32, id="reference-float32"),
    pytest.param("reference", torch.float16, id="reference-float16"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("choice", "dtype"), BACKENDS)
@pytest.mark.parametrize("scales", SCALES)
def test_guided_step(scales: int, choice: str, dtype, shape: tuple[int, ...]) -> None:
    data = make(shape, scales, dtype)
    method = solver.METHODS[scales]  # every method with one number of conditions
    channels = 3 if scales else None
    with kernels.use_backend(choice):
        got = ours(data, method, "eps", channels)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_close(got, exact(data, method, "eps", channels))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("prediction", solver.PREDICTIONS)
@pytest.mark.parametrize("method", solver.METHODS)
def test_every_rule_and_prediction(method: str, prediction: str, choice: str) -> None:
    data = make((3, 4, 8, 8), 1)
    with kernels.use_backend(choice):
        got = ours(data, method, prediction, None)
        shared = ours(data, method, prediction, None, rows=False)
    assert_close(got, exact(data, method, prediction, None))
    assert all(torch.equal(a, b) for a, b in zip(got, shared, strict=True))


@pytest.mark.parametrize("method", solver.METHODS)
def test_the_way_to_the_clean_point_ends_at_the_estimate(method: str) -> None:
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    row = solver.solver_coefficients(
        method, "eps", *(torch.tensor(c) for c in POINTS[0]), one, zero,
        alpha_previous=torch.tensor(0.28), sigma_previous=torch.tensor(0.96),
    )  # fmt: skip
    data = make((2, 3, 4, 4), 0)
    following, x0 = kernels.solver_step(data["x"], data["prediction"], row, extra=data["extra"])
    assert torch.equal(following, x0)


def test_pure_noise_is_a_point_like_any_other() -> None:
    """alpha 0 has an infinite log ratio: no coefficient may be infinite or undefined."""
    points = [torch.tensor(c) for c in (0.0, 1.0, 0.6, 0.8)]
    for method in solver.METHODS:
        row = solver.solver_coefficients(method, "v", *points)
        assert bool(row.isfinite().all()), method
    after = solver.solver_coefficients(
        "dpmpp_2m", "v", *(torch.tensor(c) for c in (0.6, 0.8, 0.8, 0.6)),
        alpha_previous=torch.tensor(0.0), sigma_previous=torch.tensor(1.0),
    )  # fmt: skip
    first = solver.solver_coefficients("dpmpp_2m", "v", *map(torch.tensor, (0.6, 0.8, 0.8, 0.6)))
    assert torch.equal(after, first)


@pytest.mark.parametrize("choice", CHOICES)
def test_strides_do_not_change_the_step(choice: str) -> None:
    data = make((3, 4, 6, 10), 2)
    with kernels.use_backend(choice):
        want = ours(data, "dpmpp_2m", "v", 3)
        last = {k: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v
                for k, v in data.items()}  # fmt: skip
        moved = ours(last, "dpmpp_2m", "v", 3)
        mixed = ours(data | {"prediction": last["prediction"]}, "dpmpp_2m", "v", 3)
        wide = torch.cat((data["x"], data["x"]), 1)
        views = {"x": wide[:, 2:6].roll(2, 1).transpose(2, 3).contiguous().transpose(2, 3)}
        views["extra"] = torch.stack((data["extra"],) * 2, 1)[:, 1]
        viewed = ours(data | views, "dpmpp_2m", "v", 3)
    for other in (moved, mixed, viewed):
        assert_close(other, want, 1e-6)
    if choice == "cpp":
        assert moved[0].is_contiguous(memory_format=torch.channels_last)


@needs_cpp
def test_bits_do_not_depend_on_threads_batch_or_repetition() -> None:
    data, runs = make((5, 4, 20, 20), 1), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(ours(data, "ddpm", "flow", None))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert torch.equal(runs[0][0], other[0]) and torch.equal(runs[0][1], other[1])
    one = {k: v[3:4] for k, v in data.items()} | {"prediction": data["prediction"][[3, 8]]}
    assert torch.equal(ours(one, "ddpm", "flow", None)[0], runs[0][0][3:4])


@needs_cpp
@pytest.mark.parametrize("level", backends.cpp().levels() if backends.HAS_CPP else [])
def test_every_processor_level(level: str) -> None:
    data = make((2, 4, 20, 20), 2, torch.bfloat16)
    images = torch.linspace(-1.5, 1.5, 2 * 3 * 50 * 7).view(2, 3, 50, 7)
    before = backends.cpp().set_level(level)
    try:
        got, levels = ours(data, "dpmpp_2m", "v", 3), kernels.to_uint8(images)
    finally:
        backends.cpp().set_level(before)
    assert_close(got, exact(data, "dpmpp_2m", "v", 3))
    assert torch.equal(levels, kernels.to_uint8_reference(images))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 0, 8)], ids=str)
def test_zero_size(choice: str, shape: tuple[int, ...]) -> None:
    with kernels.use_backend(choice):
        got = ours(make(shape, 1), "ddim", "flow", None)
        levels = kernels.to_uint8(torch.zeros(shape))
    assert got[0].shape == got[1].shape == shape
    assert levels.shape == (shape[0], *shape[2:], shape[1])


@pytest.mark.parametrize("choice", CHOICES)
def test_float64_stays_float64_and_gradients_are_the_references(choice: str) -> None:
    data = {k: v.double() for k, v in make((2, 3, 4, 5), 1).items()}
    with kernels.use_backend(choice):
        assert_close(ours(data, "ddim", "v", 2), exact(data, "ddim", "v", 2), 1e-13)

        def function(x: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
            return ours(data | {"x": x, "prediction": prediction}, "dpmpp_2m", "v", 2)

        leaves = data["x"].requires_grad_(), data["prediction"].requires_grad_()
        assert torch.autograd.gradcheck(function, leaves)
        narrow = data["x"].detach().float().requires_grad_()
        made = ours({k: v.detach().float() for k, v in data.items()} | {"x": narrow},
                    "ddim", "eps", None)  # fmt: skip
        made[0].sum().backward()
    row = table("ddim", "eps")
    slope = float(row[4] + row[5] * row[0] + row[6] * row[2])
    torch.testing.assert_close(narrow.grad, torch.full_like(narrow, slope))


@needs_cpp
def test_the_operator_itself_refuses_a_gradient() -> None:
    data = make((2, 3, 4, 4), 0)
    row = table("ddim", "eps").float()
    x = data["x"].requires_grad_()
    made = solver.ops.solver_step(x, data["prediction"], row, None, 3, None)
    with pytest.raises(RuntimeError, match="no backward pass"):
        made[0].sum().backward()


@needs_cpp
def test_a_whole_loop_compiles_without_a_break(monkeypatch) -> None:
    monkeypatch.undo()  # the compiler's own empty tensors must stay as they are
    data = make((2, 3, 8, 8), 1)
    rows = torch.stack([table("ddim", "flow"), table("ddim", "v")]).float()

    def loop(x: Tensor, guidance: Tensor, rows: Tensor) -> Tensor:
        for row in rows.unbind(0):
            network = torch.cat((torch.sin(x), torch.cos(x)))
            x, _ = kernels.solver_step(x, network, row, guidance=guidance)
        return x

    torch._dynamo.reset()
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    got = compiled(data["x"], data["guidance"], rows)
    torch.testing.assert_close(got, loop(data["x"], data["guidance"], rows), rtol=1e-6, atol=1e-6)


@needs_cpp
def test_operators_keep_the_rules_of_torch_library() -> None:
    data = make((2, 3, 4, 4), 2)
    row = table("ddim", "eps").float()
    given = (data["x"], data["prediction"], row, data["guidance"], 2, data["extra"])
    torch.library.opcheck(solver.ops.solver_step.default, given)
    torch.library.opcheck(solver.ops.to_uint8.default, (data["x"],))


@needs_cpp
def test_verification_notices_a_wrong_step(monkeypatch) -> None:
    data = make((2, 3, 4, 4), 1)
    with kernels.use_backend("cpp", verify=True):
        ours(data, "ddim", "eps", 2)
        kernels.to_uint8(data["x"])
        wrong = solver.solver_step_reference
        monkeypatch.setattr(solver, "solver_step_reference",
                            lambda *a, **k: tuple(-t for t in wrong(*a, **k)))  # fmt: skip
        with pytest.raises(AssertionError, match="solver_step C\\+\\+: output x differs"):
            ours(data, "ddim", "eps", 2)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bytes(choice: str, dtype, layout: str) -> None:
    g = torch.Generator().manual_seed(1)
    images = (torch.randn(2, 3, 33, 70, generator=g) * 0.7).to(dtype)
    images[0, 0, 0, :4] = torch.tensor([-1.0, 1.0, float("inf"), float("-inf")])
    # Halves between two levels go to the even one.
    images[1, 1, 0, :60] = ((torch.arange(60) * 4 + 0.5) / 127.5 - 1).to(dtype)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    with kernels.use_backend(choice):
        got = kernels.to_uint8(images)
    levels = torch.round((images.float() + 1.0) * 127.5).clamp(0, 255)
    assert got.shape == (2, 33, 70, 3) and got.is_contiguous()
    assert torch.equal(got, levels.to(torch.uint8).permute(0, 2, 3, 1))


GOOD = {
    "x": torch.zeros(2, 3, 4, 4),
    "prediction": torch.zeros(4, 3, 4, 4),
    "coefficients": torch.zeros(2, 8),
    "guidance": torch.zeros(1),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 4, 4).half()}, "x must be float32 or float64 (B, C, ...)"),
        ({"prediction": torch.zeros(2, 3, 4, 4)}, "prediction must be (4, 3, 4, 4), or have more"),
        ({"prediction": torch.zeros(4, 2, 4, 4)}, "got (4, 2, 4, 4)"),
        ({"coefficients": torch.zeros(3, 8)}, "coefficients must be (8,) or (2, 8), got (3, 8)"),
        ({"guidance": torch.zeros(3)}, "guidance must end in 1 or 2 scales: (3,)"),
        ({"guidance": torch.zeros(3, 1)}, "guidance has 3 rows for 2 samples"),
        ({"guidance": torch.zeros(1).int()}, "guidance is torch.int32"),
        ({"extra": torch.zeros(2, 3, 4, 5)}, "extra must be (2, 3, 4, 4), got (2, 3, 4, 5)"),
        (
            {"guidance": None, "prediction": torch.zeros(2, 3, 4, 4), "guided_channels": 3},
            "guided_channels has no effect without guidance",
        ),
    ],
)
def test_bad_input_gets_one_sentence(change: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        kernels.solver_step(**(GOOD | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="use ddim, dpmpp_2m, ddpm and flow, eps, v, x0"):
        solver.solver_coefficients("euler", "eps", *[torch.ones(())] * 4)
    with pytest.raises(ValueError, match="images must be floating point"):
        kernels.to_uint8(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
