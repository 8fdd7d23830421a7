"""Noise, noising and diffusion losses: C++ and reference against closed forms in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, noising, philox

pytestmark = pytest.mark.usefixtures("poisoned_empty")
needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")
# RMS of the error over RMS of the value. float32: two roundings of values of size 1, and eps that
# is within 1e-6; with a variance the exponentials of logarithms near -10 add 10 * 2^-24 each.
# bfloat16 and float16: one rounding of each output.
RATIO = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
KEY = {"seed": 0xFFFFFFF3, "stream": 0xF0000008}  # both halves with their highest bit
SHAPES = [(3, 4, 8, 8), (2, 4, 16, 24), (2, 3, 5, 7), (5, 1), (1, 2, 1100), (1, 1, 1, 1)]


def make(shape: tuple[int, ...], dtype: torch.dtype, double: bool = False) -> dict[str, Tensor]:
    """Latents, a prediction (with twice the channels if asked for) and the samples' numbers."""
    g = torch.Generator().manual_seed(sum(shape))
    count = shape[0]
    wide = (count, shape[1] * (1 + double), *shape[2:])
    t = torch.rand(count, generator=g) * 0.8 + 0.1
    bound = torch.stack((0.02 + t * 0.05, -10 + t, -6 + t, torch.zeros(count)), 1)
    bound[: (count + 1) // 2, 3] = 1.0  # half of the samples at the first entry
    bound[:, 0] = torch.where(bound[:, 3] != 0, 1e-2 * t, bound[:, 0])
    x0 = torch.randn(shape, generator=g) * 0.6  # some beyond the open levels at 1 and -1
    return {
        "prediction": torch.randn(wide, generator=g).to(dtype),
        "x0": x0.to(dtype),
        "positions": torch.arange(count) * 12_345_678_901 + (1 << 40),
        "alpha": 1 - t,
        "sigma": t,
        "weight": torch.rand(count, generator=g) + 0.5,
        "bound": bound,
    }


def exact_noise(positions: Tensor, shape: tuple[int, ...], seed: int, stream: int) -> Tensor:
    """Box-Muller in float64 numpy, from an own walk over the counters."""
    size = math.prod(shape)
    fields = []
    for position in positions.tolist():
        counter = [np.full(-(-size // 4), c, np.uint64) for c in (position & philox.MASK, 0, 0, 0)]
        counter[1][:] = position >> 32
        counter[2] = np.arange(-(-size // 4), dtype=np.uint64)
        words = philox.philox_rounds((seed, stream), tuple(counter))
        # The angle is rounded to float32 by the formula; everything after it is exact here.
        turns = [np.float32(w >> 8) * np.float32(2 * math.pi * 2.0**-24) for w in words]
        radii = [np.sqrt(-2 * np.log(((w >> 8) + 1).astype(float) * 2.0**-24)) for w in words]
        lanes = []
        for first, second in ((0, 1), (2, 3)):
            angle = turns[second].astype(float)
            lanes += [radii[first] * np.cos(angle), radii[first] * np.sin(angle)]
        fields.append(np.stack(lanes, -1).reshape(-1)[:size])
    return torch.from_numpy(np.stack(fields)).reshape(-1, *shape)


def exact(op: str, data: dict[str, Tensor], target: str, learned: bool) -> Tensor:
    """The operator in float64 from the published equations, with torch's distributions."""
    x0 = data["x0"].double()
    eps = exact_noise(data["positions"], tuple(x0.shape[1:]), **KEY)
    alpha, sigma = (data[k].double().view(-1, *[1] * (x0.dim() - 1)) for k in ("alpha", "sigma"))
    if op == "noise_like":
        return eps
    if op == "diffuse":
        return alpha * x0 + sigma * eps
    prediction = data["prediction"].double()[:, : x0.shape[1]]
    wanted = {"flow": eps - x0, "eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[target]
    losses = (prediction - wanted).square().flatten(1).mean(1) * data["weight"].double()
    return losses + exact_bound(data, eps) if learned else losses


def exact_bound(data: dict[str, Tensor], eps: Tensor) -> Tensor:
    """The divergence between two normals, or the likelihood of a level, in bits."""
    x0 = data["x0"].double()
    half = x0.shape[1]
    held = data["prediction"].double()[:, :half].detach()
    scale, smallest, largest, first = (
        c.view(-1, *[1] * (x0.dim() - 1)) for c in data["bound"].double().unbind(1)
    )
    fraction = (data["prediction"].double()[:, half:] + 1) / 2
    log_hat = fraction * largest + (1 - fraction) * smallest
    mean = torch.zeros_like(x0)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, torch.exp(smallest / 2).expand_as(mean)),
        torch.distributions.Normal(scale * (held - eps), torch.exp(log_hat / 2)),
    )

    def below(x: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    miss, scaled = scale * (held - eps), torch.exp(-log_hat / 2)
    upper, lower = below((miss + 1 / 255) * scaled), below((miss - 1 / 255) * scaled)
    inside = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    term = torch.where(first != 0, -inside.clamp(min=1e-12).log(), divergence)
    return term.flatten(1).mean(1) / math.log(2)


def ours(op: str, data: dict[str, Tensor], target: str, learned: bool) -> Tensor:
    if op == "noise_like":
        return kernels.noise_like(data["x0"], data["positions"], **KEY)
    noised = [data[k] for k in ("x0", "positions", "alpha", "sigma")]
    if op == "diffuse":
        return kernels.diffuse(*noised, **KEY)
    more = {"bound": data["bound"]} if learned else {}
    return kernels.diffusion_loss(
        data["prediction"], *noised, **KEY, target=target, weight=data["weight"], **more
    )


def run(function, op: str, data: dict[str, Tensor], target: str, learned: bool) -> dict:
    """The output and the prediction's gradient, every sample's loss weighed differently."""
    leaf = data["prediction"].detach().requires_grad_()
    made = function(op, data | {"prediction": leaf}, target, learned)
    if op != "diffusion_loss":
        return {"output": made}
    made.backward(torch.linspace(0.5, 2, len(made), dtype=made.dtype))
    return {"output": made.detach(), "gradient": leaf.grad}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        a, b = got[name].double(), want[name].double()
        error, size = (a - b).square().mean().sqrt(), b.square().mean().sqrt()
        assert error <= ratio * size + 1e-9, f"{name}: error ratio {float(error / size):.2e}"


LOSSES = [(t, False) for t in noising.TARGETS] + [("eps", True)]
BACKENDS = [
    pytest.param("cpp", torch.float32, marks=needs_cpp, id="cpp-float32"),
    pytest.param("cpp", torch.bfloat16, marks=needs_cpp, id="cpp-bfloat16"),
    pytest.param("reference", torch.float32, id="reference-float32"),
    pytest.param("reference", torch.float16, id="reference-float16"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("choice", "dtype"), BACKENDS)
@pytest.mark.parametrize("op", ["noise_like", "diffuse"])
def test_noise_and_noising(op: str, shape: tuple[int, ...], choice: str, dtype) -> None:
    data = make(shape, dtype)
    with kernels.use_backend(choice):
        got = ours(op, data, "flow", False)
    want = exact(op, data, "flow", False)
    assert got.dtype == dtype and got.shape == shape
    assert_close({"output": got}, {"output": want}, RATIO[dtype])
    if op == "noise_like" and dtype == torch.float32:
        assert float((got - want).abs().max()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("choice", "dtype"), BACKENDS)
@pytest.mark.parametrize(("target", "learned"), LOSSES)
def test_losses_and_their_gradients(
    target: str, learned: bool, shape: tuple[int, ...], choice: str, dtype
) -> None:
    data = make(shape, dtype, double=learned)
    with kernels.use_backend(choice):
        got = run(ours, "diffusion_loss", data, target, learned)
    assert got["output"].dtype == torch.float32 and got["gradient"].dtype == dtype
    want = run(exact, "diffusion_loss", data | {"prediction": data["prediction"].double()},
               target, learned)  # fmt: skip
    # The loss is a float32 sum in every case.
    assert_close({"loss": got["output"]}, {"loss": want["output"]}, RATIO[torch.float32])
    assert_close({"g": got["gradient"]}, {"g": want["gradient"]}, RATIO[dtype])
    if learned:
        half = shape[1]
        second = {"g": got["gradient"][:, half:]}, {"g": want["gradient"][:, half:]}
        assert_close(*second, 10 * RATIO[dtype])


def test_the_reference_is_the_noise_of_the_engine() -> None:
    from etude.core import rng

    data = make((3, 4, 8, 8), torch.float32)
    with kernels.use_backend("reference"):
        got = kernels.noise_like(data["x0"], data["positions"], seed=5, stream=8)
    assert torch.equal(got, rng.normal(5, 8, data["positions"], (4, 8, 8)))


@needs_cpp
@pytest.mark.parametrize("level", backends.cpp().levels() if backends.HAS_CPP else [])
def test_every_processor_level_draws_the_same_words(level: str) -> None:
    """The pairs before the logarithm have the bits of torch's; the normals are within 2e-6."""
    positions = torch.tensor([0, 1, 0xFFFFFFFF, (7 << 32) + 5, 2**62])
    want = philox.uniform_pairs_reference(KEY["seed"], KEY["stream"], positions, 1001)
    before = backends.cpp().set_level(level)
    try:
        got = philox.uniform_pairs(KEY["seed"], KEY["stream"], positions, 1001)
        eps = kernels.noise_like(torch.empty(5, 4004), positions, **KEY)
        data = make((3, 4, 8, 8), torch.float32, double=True)
        loss = run(ours, "diffusion_loss", data, "eps", True)
    finally:
        backends.cpp().set_level(before)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert float((eps - exact_noise(positions, (4004,), **KEY)).abs().max()) < 2e-6
    wide = data | {"prediction": data["prediction"].double()}
    assert_close(loss, run(exact, "diffusion_loss", wide, "eps", True), 1e-5)


def test_known_answers() -> None:
    """Random123's kat_vectors for philox4x32 with 10 rounds, through the counter layout."""
    position, block = 0x85A308D3_243F6A88 - (1 << 64), 0x13198A2E
    answer = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    counter = (position & philox.MASK, (position >> 32) & philox.MASK, block, 0x03707344)
    words = philox.philox_rounds((0xA4093822, 0x299F31D0), tuple(np.full(1, c, np.uint64)
                                                                 for c in counter))  # fmt: skip
    assert tuple(int(w[0]) for w in words) == answer
    zeros = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    u, angle = philox.uniform_pairs(0, 0, torch.zeros(1, dtype=torch.int64), 1)
    assert (u.flatten() * 2**24).tolist() == [(w >> 8) + 1 for w in zeros[::2]]
    turn = np.float32(2 * math.pi * 2.0**-24)
    assert angle.flatten().tolist() == [float(np.float32(w >> 8) * turn) for w in zeros[1::2]]


@pytest.mark.parametrize("choice", CHOICES)
def test_memory_format_and_views_do_not_change_the_noise(choice: str) -> None:
    data = make((3, 4, 6, 10), torch.float32, double=True)
    last = torch.channels_last
    with kernels.use_backend(choice):
        plain = [run(ours, "diffusion_loss", data, "eps", True), ours("diffuse", data, "", False)]
        other = dict(data)
        other["x0"] = data["x0"].contiguous(memory_format=last)
        other["prediction"] = data["prediction"].contiguous(memory_format=last)
        moved = [run(ours, "diffusion_loss", other, "eps", True), ours("diffuse", other, "", False)]
        # Views: every second row of a batch, the middle of the channels, a transposed picture.
        other["x0"] = torch.stack((data["x0"], data["x0"] * 7), 1)[:, 0]
        wide = torch.cat((data["prediction"], data["prediction"]), 1)
        other["prediction"] = wide[:, 4:12].roll(4, 1).transpose(2, 3).contiguous().transpose(2, 3)
        views = run(ours, "diffusion_loss", other, "eps", True)
    if choice == "cpp":
        assert moved[1].is_contiguous(memory_format=last)
        assert torch.equal(plain[1], moved[1])
    assert_close({"x_t": moved[1]}, {"x_t": plain[1]}, 1e-6)
    for name in plain[0]:
        for other_run in (moved[0], views):
            assert_close({"v": other_run[name]}, {"v": plain[0][name]}, 1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_sample_is_the_same_in_any_batch_and_thread_count(choice: str) -> None:
    data = make((5, 4, 20, 20), torch.float32, double=True)
    threads, runs = torch.get_num_threads(), []
    try:
        with kernels.use_backend(choice):
            for count in (1, 1, 2, 5):
                torch.set_num_threads(count)
                runs.append(run(ours, "diffusion_loss", data, "eps", True))
            one = {k: v[3:4] for k, v in data.items()}
            alone = ours("diffusion_loss", one, "eps", True), ours("diffuse", one, "eps", False)
            noisy = ours("diffuse", data, "eps", False)
    finally:
        torch.set_num_threads(threads)
    if choice == "cpp":
        for other in runs[1:]:
            assert all(torch.equal(runs[0][k], other[k]) for k in other)
        assert torch.equal(alone[0], runs[0]["output"][3:4])
    torch.testing.assert_close(alone[0], runs[0]["output"][3:4], rtol=1e-6, atol=1e-7)
    assert torch.equal(alone[1], noisy[3:4])


@pytest.mark.parametrize("choice", CHOICES)
def test_a_second_half_without_a_bound_gets_zeros(choice: str) -> None:
    data = make((2, 3, 4, 4), torch.float32, double=True)
    with kernels.use_backend(choice):
        both = run(ours, "diffusion_loss", data, "flow", False)
        first = run(ours, "diffusion_loss", data | {"prediction": data["prediction"][:, :3]},
                    "flow", False)  # fmt: skip
    assert torch.equal(both["output"], first["output"])
    assert torch.equal(both["gradient"][:, :3], first["gradient"])
    assert torch.equal(both["gradient"][:, 3:], torch.zeros(2, 3, 4, 4))


def not_a_number() -> dict[str, Tensor]:
    """Four samples, two at the table's first entry; one variance of either kind is NaN."""
    data = make((4, 3, 2, 2), torch.float32, double=True)
    data["prediction"][0, 4, 1, 1] = data["prediction"][2, 5, 0, 1] = torch.nan
    return data


@pytest.mark.parametrize("choice", CHOICES)
def test_a_variance_that_is_not_a_number_shows_in_the_loss(choice: str) -> None:
    with kernels.use_backend(choice):
        loss = ours("diffusion_loss", not_a_number(), "eps", True)
    assert loss.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (2, 4, 0, 8)], ids=str)
def test_zero_size(choice: str, shape: tuple[int, ...]) -> None:
    data = make(shape, torch.float32)
    with kernels.use_backend(choice):
        noisy, loss = ours("diffuse", data, "flow", False), run(ours, "diffusion_loss", data,
                                                                "flow", False)  # fmt: skip
    assert noisy.shape == shape and loss["gradient"].shape == shape
    assert loss["output"].shape == shape[:1] and bool(loss["output"].isnan().all())


@pytest.mark.parametrize("choice", CHOICES)
def test_float64_stays_float64(choice: str) -> None:
    data = make((2, 3, 5, 7), torch.float64, double=True)
    data |= {k: data[k].double() for k in ("alpha", "sigma", "weight", "bound")}
    with kernels.use_backend(choice):
        got = run(ours, "diffusion_loss", data, "eps", True)
    assert got["output"].dtype == torch.float64
    # The noise is a float32 number in every dtype.
    assert_close(got, run(exact, "diffusion_loss", data, "eps", True), RATIO[torch.float32])


def test_reference_passes_gradcheck() -> None:
    data = make((2, 2, 3, 3), torch.float64, double=True)

    def function(x0: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        # The first half is held fixed inside the bound, so only the second is checked there.
        prediction = torch.cat((data["prediction"][:, :2], variance), 1)
        given = data | {"prediction": prediction}
        noisy = kernels.diffuse(x0, *(data[k] for k in ("positions", "alpha", "sigma")), **KEY)
        return noisy, ours("diffusion_loss", given, "eps", True)

    leaves = data["x0"].clone().requires_grad_(), data["prediction"][:, 2:].clone()
    assert torch.autograd.gradcheck(function, (leaves[0], leaves[1].requires_grad_()))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_gradient_flows_through_the_noising_to_the_latents(choice: str) -> None:
    data = make((2, 3, 4, 4), torch.bfloat16)
    leaf = data["x0"].clone().requires_grad_()
    with kernels.use_backend(choice):
        noisy = kernels.diffuse(
            leaf, data["positions"], data["alpha"], data["sigma"], **KEY, dtype=torch.float32
        )
    assert noisy.dtype == torch.float32
    noisy.sum().backward()
    want = data["alpha"].view(2, 1, 1, 1).expand_as(leaf).bfloat16()
    assert torch.equal(leaf.grad, want)


@needs_cpp
def test_second_derivatives_are_refused() -> None:
    data = make((2, 3, 4, 4), torch.float32)
    leaf = data["prediction"].requires_grad_()
    with kernels.use_backend("cpp"):
        loss = ours("diffusion_loss", data, "flow", False).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@needs_cpp
def test_compiles_without_a_break() -> None:
    data = make((3, 4, 8, 8), torch.float32, double=True)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ours("diffuse", data, "", False), ours("diffusion_loss", data, "eps", True)

    leaf = data["prediction"].detach().clone().requires_grad_()
    noisy, loss = step(data | {"prediction": leaf})
    loss.backward(torch.linspace(0.5, 2, 3))
    want = run(ours, "diffusion_loss", data, "eps", True)
    assert torch.equal(noisy, ours("diffuse", data, "", False))
    assert torch.equal(loss, want["output"]) and torch.equal(leaf.grad, want["gradient"])


@needs_cpp
def test_operators_keep_the_rules_of_torch_library() -> None:
    data = make((2, 3, 4, 4), torch.float32, double=True)
    leaf = data["prediction"].requires_grad_()
    noised = [data[k] for k in ("x0", "positions", "alpha", "sigma")]
    check = torch.library.opcheck
    check(noising.ops.noise_like.default, (data["x0"], data["positions"], 3, 8))
    check(noising.ops.diffuse.default, (*noised, 3, 8, torch.bfloat16))
    given = (leaf, *noised, data["weight"], data["bound"], 3, 8, 1)
    check(noising.ops.diffusion_loss.default, given)


@needs_cpp
def test_under_checkpoint_and_autocast_the_loss_is_the_same() -> None:
    data = make((2, 3, 4, 4), torch.bfloat16)
    want = run(ours, "diffusion_loss", data, "v", False)

    def through(op, data, target, learned):
        def inner(p: Tensor) -> Tensor:
            return ours(op, data | {"prediction": p}, target, learned)

        with torch.autocast("cpu", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(inner, data["prediction"], use_reentrant=False)

    got = run(through, "diffusion_loss", data, "v", False)
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize(("target", "learned"), LOSSES)
def test_the_written_gradient_is_that_of_autograd(target: str, learned: bool) -> None:
    data = make((4, 3, 4, 6), torch.float64, double=learned)
    data |= {k: data[k].double() for k in ("alpha", "sigma", "weight", "bound")}
    want = run(ours, "diffusion_loss", data, target, learned)["gradient"]
    noised = [data[k] for k in ("prediction", "x0", "positions", "alpha", "sigma")]
    more = {"bound": data["bound"]} if learned else {}
    got = noising.diffusion_loss_gradient_reference(
        torch.linspace(0.5, 2, 4).double(), *noised, **KEY, target=target, weight=data["weight"],
        **more,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@needs_cpp
def test_verification_passes_and_notices_a_wrong_sign(monkeypatch) -> None:
    data = make((2, 3, 4, 4), torch.float32, double=True)
    with kernels.use_backend("cpp", verify=True):
        for op in ("noise_like", "diffuse"):
            ours(op, data, "", False)
        run(ours, "diffusion_loss", data, "eps", True)
        monkeypatch.setattr(
            noising, "diffusion_loss_reference", lambda p, *a, **k: p.flatten(1).sum(1)
        )
        with pytest.raises(AssertionError, match="diffusion_loss C\\+\\+: output loss differs"):
            ours("diffusion_loss", data, "eps", True)


GOOD = {
    "prediction": torch.zeros(2, 3, 4, 4),
    "x0": torch.zeros(2, 3, 4, 4),
    "positions": torch.zeros(2, dtype=torch.int64),
    "alpha": torch.ones(2),
    "sigma": torch.ones(2),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x0": torch.zeros(2)}, "x0 must be floating point (B, C, ...), got torch.float32 (2,)"),
        ({"positions": torch.zeros(2)}, "positions must be int64 (2,), got torch.float32"),
        ({"alpha": torch.ones(3)}, "alpha must be (2,) on cpu, got (3,)"),
        ({"sigma": torch.ones(2, requires_grad=True)}, "sigma gets no gradient: detach it"),
        ({"x0": torch.zeros(2, 3, 4, 4, requires_grad=True)}, "x0 gets no gradient"),
        ({"prediction": torch.zeros(2, 4, 4, 4)}, "or have twice the channels, got (2, 4, 4, 4)"),
        ({"prediction": torch.zeros(2, 3, 4, 4).int()}, "prediction is torch.int32"),
        ({"target": "score"}, "target='score' is unknown: use flow, eps, v, x0"),
        ({"bound": torch.zeros(2, 4)}, "bound needs target 'eps' and a prediction of 6 channels"),
        ({"weight": torch.ones(2, 1)}, "weight must be (2,) on cpu"),
    ],
)
def test_bad_input_gets_one_sentence(change: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        kernels.diffusion_loss(**(GOOD | {"seed": 1, "stream": 2, "target": "flow"} | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
