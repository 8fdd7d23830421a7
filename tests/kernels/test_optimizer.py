"""adamw_ema against float64, and against torch.optim.AdamW; the same bits however it is run."""

import itertools

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends

needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
SHAPES = [(37, 5), (1,), (), (16385,), (0, 3), (129, 129)]
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
DECAYS = (0.9, 0.999)
HARD = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
HARD_DECAYS = (0.9, 0.9999)


def make(dtype: torch.dtype, seed: int = 0) -> dict[str, list]:
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]
    return {
        "params": params,
        "exp_avgs": [torch.zeros_like(p) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p) for p in params],
        "emas": [[p.clone() for p in params] for _ in DECAYS],
        "steps": [torch.zeros(()) for _ in params],
    }


def gradients(dtype: torch.dtype, step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]


def take(state: dict[str, list], grads: list[Tensor], **changes) -> None:
    lists = dict(state)
    params = lists.pop("params")
    kernels.adamw_ema(params, grads, **lists, **(SETTINGS | {"ema_decays": DECAYS} | changes))


def flat(state: dict[str, list]) -> list[Tensor]:
    return [t for k, v in state.items() for t in (sum(v, []) if k == "emas" else v)]


def by_torch(steps: int, scale: float) -> tuple[list[Tensor], list[list[Tensor]]]:
    """torch.optim.AdamW in float64, with the averages written out."""
    params = [p.requires_grad_() for p in make(torch.float64)["params"]]
    emas = [[p.detach().clone() for p in params] for _ in DECAYS]
    optimizer = torch.optim.AdamW(params, foreach=False, **SETTINGS)
    for step in range(steps):
        for p, g in zip(params, gradients(torch.float64, step), strict=True):
            p.grad = g * scale
        optimizer.step()
        for decay, averages in zip(DECAYS, emas, strict=True):
            for average, p in zip(averages, params, strict=True):
                average.mul_(decay).add_(p.detach(), alpha=1 - decay)
    return [p.detach() for p in params], emas


def hard(count: int, seed: int) -> dict[str, Tensor]:
    """Magnitudes over twelve decades; in a third of the first moment's sums the terms cancel."""
    g = torch.Generator().manual_seed(seed)

    def wide(low: float, high: float) -> Tensor:
        size = 10 ** (torch.rand(count, generator=g, dtype=torch.float64) * (high - low) + low)
        return size * torch.randint(0, 2, (count,), generator=g).mul(2).sub(1)

    made = {name: wide(-9, 3).float() for name in ("param", "grad", "exp_avg", "ema0", "ema1")}
    third = count // 3
    # down to a millionth: below, the float64 result to compare with loses its own last places
    off = 1 + 10 ** (torch.rand(third, generator=g, dtype=torch.float64) * 5 - 6)
    made["exp_avg"][:third] = (made["grad"][:third].double() * -0.1 / 0.9 * off).float()
    made["exp_avg_sq"] = wide(-18, 6).abs().float()
    made["exp_avg_sq"][third : third + 5] = 0.0
    return made


def by_float64(
    data: dict[str, Tensor], step: float, lr: float, scale: float, stored: Tensor
) -> dict[str, Tensor]:
    """The equations as they are written, in float64; the averages from the weight as stored."""
    (beta1, beta2), eps = HARD["betas"], HARD["eps"]
    wide, t = {k: v.double() for k, v in data.items()}, step + 1
    g = wide["grad"] * scale
    m = beta1 * wide["exp_avg"] + (1 - beta1) * g
    v = beta2 * wide["exp_avg_sq"] + (1 - beta2) * g * g
    bottom = v.sqrt() / (1 - beta2**t) ** 0.5 + eps
    p = wide["param"] * (1 - lr * HARD["weight_decay"]) - lr / (1 - beta1**t) * m / bottom
    made = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    for k, decay in enumerate(HARD_DECAYS):
        made[f"ema{k}"] = decay * wide[f"ema{k}"] + (1 - decay) * stored.double()
    return made


def units(got: Tensor, want: Tensor) -> float:
    """Largest error in units in the last place of the float32 number at `want`."""
    size = want.abs().float()
    last = torch.nextafter(size, torch.tensor(torch.inf)) - size
    return float(((got.double() - want).abs() / last.double()).max())


def errors(count: int) -> dict[str, float]:
    """Largest error of each state over all steps and rates, in units in the last place."""
    worst: dict[str, float] = {}
    for seed, (step, lr) in enumerate(itertools.product((0.0, 999_999.0), (1e-5, 1e-3, 1e-1))):
        scale = (1.0, 0.37)[seed % 2]
        data = hard(count, seed)
        made = {name: t.clone() for name, t in data.items()}
        kernels.adamw_ema(
            [made["param"]], [made["grad"]], [made["exp_avg"]], [made["exp_avg_sq"]],
            [[made["ema0"]], [made["ema1"]]], [torch.tensor(step)],
            lr=lr, ema_decays=HARD_DECAYS, grad_scale=None if scale == 1.0 else scale, **HARD,
        )  # fmt: skip
        want = by_float64(data, step, lr, scale, made["param"])
        for name, value in want.items():
            worst[name] = max(worst.get(name, 0.0), units(made[name], value))
    return worst


@pytest.mark.parametrize(
    ("choice", "dtype", "bound"),
    [
        pytest.param("reference", torch.float64, 1e-14, id="reference-float64"),
        pytest.param("reference", torch.float32, 2e-6, id="reference-float32"),
        pytest.param("cpp", torch.float32, 2e-6, id="cpp-float32", marks=needs_cpp),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_against_torch_adamw(choice: str, dtype: torch.dtype, bound: float, scale: float) -> None:
    state = make(dtype)
    with kernels.use_backend(choice):
        for step in range(12):
            take(state, gradients(dtype, step), grad_scale=torch.tensor(scale, dtype=dtype))
    params, emas = by_torch(12, scale)
    for got, want in zip(state["params"], params, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
    for got, want in zip(sum(state["emas"], []), sum(emas, []), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
    assert all(float(s) == 12 for s in state["steps"])


@needs_cpp
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("level", backends.cpp().levels() if backends.HAS_CPP else [])
@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_at_every_level(level: str, grad_dtype: torch.dtype, threads: int) -> None:
    fast, slow = make(torch.float32), make(torch.float32)
    want = make(torch.float32)
    before, count = backends.cpp().level(), torch.get_num_threads()
    try:
        for step in range(5):
            grads = gradients(grad_dtype, step)
            changes = {"lr": torch.tensor(1e-3 * (step + 1)), "grad_scale": 0.7}
            changes["ema_decays"] = [min(0.9, step / (step + 10)), torch.tensor(0.999)]
            with kernels.use_backend("cpp"):
                backends.cpp().set_level(level)
                torch.set_num_threads(threads)
                take(fast, grads, **changes)
                backends.cpp().set_level("base")
                torch.set_num_threads(1)
                take(slow, grads, **changes)
            with kernels.use_backend("reference"):
                take(want, grads, **changes)
    finally:
        backends.cpp().set_level(before)
        torch.set_num_threads(count)
    for a, b, c in zip(flat(fast), flat(slow), flat(want), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-7)


@needs_cpp
def test_slices_give_the_bits_of_the_whole() -> None:
    whole, parts = make(torch.float32), make(torch.float32)
    grads = gradients(torch.float32, 0)
    take(whole, grads)
    cuts = [0, 1, 777, 5000, 16385]
    for first, last in zip(cuts, cuts[1:], strict=False):
        piece = {k: [v[3][first:last]] for k, v in parts.items() if k not in ("emas", "steps")}
        piece["emas"] = [[profile[3][first:last]] for profile in parts["emas"]]
        take(piece | {"steps": [torch.zeros(())]}, [grads[3][first:last]])
    assert torch.equal(whole["params"][3], parts["params"][3])
    assert torch.equal(whole["emas"][1][3], parts["emas"][1][3])


@pytest.mark.parametrize("choice", [pytest.param("cpp", marks=needs_cpp), "reference"])
def test_found_inf_leaves_everything_as_it_was(choice: str) -> None:
    state = make(torch.float32)
    with kernels.use_backend(choice):
        take(state, gradients(torch.float32, 0))
        before = [t.clone() for t in flat(state)]
        bad = [torch.full(s, float("nan")) for s in SHAPES]
        take(state, bad, found_inf=torch.tensor(1.0))
        assert all(torch.equal(a, b) for a, b in zip(flat(state), before, strict=True))
        take(state, gradients(torch.float32, 1), found_inf=torch.tensor(0.0))
    assert all(float(s) == 2 for s in state["steps"])
    assert not torch.equal(state["params"][0], before[0])


def test_device_guard_equals_the_host_guard() -> None:
    """The branch that GPUs take (torch.where on a flag that is never read), here on the CPU."""
    from etude.kernels import optimizer

    for flag in (False, True):
        ours, want = make(torch.float32), make(torch.float32)
        grads = gradients(torch.float32, 0)
        with kernels.use_backend("reference"):
            take(want, grads, found_inf=torch.tensor(float(flag)))
        for i, param in enumerate(ours["params"]):
            settings = {**SETTINGS, "ema_decays": DECAYS, "grad_scale": 1.0, "copy": None}
            optimizer._reference_one(
                param,
                grads[i],
                ours["exp_avgs"][i],
                ours["exp_avg_sqs"][i],
                [e[i] for e in ours["emas"]],
                ours["steps"][i],
                skip=torch.tensor(flag),
                **settings,
            )
        assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(want), strict=True))


def test_bfloat16_params_run_the_reference() -> None:
    state = make(torch.bfloat16)
    want = make(torch.float64)
    for key in ("params", "exp_avgs", "exp_avg_sqs"):
        want[key] = [t.double() for t in state[key]]
    want["emas"] = [[t.double() for t in p] for p in state["emas"]]
    take(state, gradients(torch.bfloat16, 0))
    take(want, [g.double() for g in gradients(torch.bfloat16, 0)])
    for a, b in zip(state["params"], want["params"], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ema_decays": (0.9,)}, "2 emas but 1 ema_decays"),
        ({"steps": []}, "6 params but 0 steps"),
        ({"exp_avgs": [torch.zeros(2)] * 6}, "exp_avgs[0] is (2,)"),
        ({"copies": []}, "6 params but 0 copies"),
        ({"copies": [torch.zeros(s) for s in SHAPES]}, "copies[0] is torch.float32; a copy is"),
    ],
)
def test_lists_that_do_not_match(change: dict, words: str) -> None:
    state = make(torch.float32) | {k: v for k, v in change.items() if k != "ema_decays"}
    decays = {"ema_decays": change["ema_decays"]} if "ema_decays" in change else {}
    with pytest.raises(ValueError) as caught:
        take(state, gradients(torch.float32, 0), **decays)
    assert words in str(caught.value)


@pytest.mark.parametrize("choice", [pytest.param("cpp", marks=needs_cpp), "reference"])
def test_one_step_is_within_a_unit_of_float64(choice: str) -> None:
    """Float64 inside and one rounding: half a unit; C++ corrects a float32 root and quotient."""
    with kernels.use_backend(choice):
        found = errors(20_000)
    assert found.keys() == {"param", "exp_avg", "exp_avg_sq", "ema0", "ema1"}
    assert max(found.values()) <= 0.51, found


@pytest.mark.parametrize("choice", [pytest.param("cpp", marks=needs_cpp), "reference"])
def test_weights_that_the_update_cancels_and_second_moments_near_underflow(choice: str) -> None:
    """Weight and update cancel to 2^-17 of themselves, which leaves an update's 2^-42 below half a
    unit; gradients square to subnormal numbers, at 0 and around eps, and to nearly infinity."""
    g = torch.Generator().manual_seed(9)
    data = {name: torch.randn(4000, generator=g) for name in ("grad", "exp_avg", "ema0", "ema1")}
    data["exp_avg_sq"] = torch.rand(4000, generator=g)
    for first, size in enumerate((1e-22, 1e-20, 1e-8, 1e18)):
        part = slice(500 * first, 500 * first + 500)
        data["grad"][part] *= size
        data["exp_avg_sq"][part] *= size**2
    data["param"] = torch.zeros(4000)
    update = -by_float64(data, 3.0, 1e-2, 1.0, data["param"])["param"]
    off = 1 + 2.0 ** -(torch.rand(4000, generator=g, dtype=torch.float64) * 17)
    data["param"] = (update * off / (1 - 1e-2 * HARD["weight_decay"])).float()
    made = {name: t.clone() for name, t in data.items()}
    with kernels.use_backend(choice):
        kernels.adamw_ema(
            [made["param"]], [made["grad"]], [made["exp_avg"]], [made["exp_avg_sq"]],
            [[made["ema0"]], [made["ema1"]]], [torch.tensor(3.0)],
            lr=1e-2, ema_decays=HARD_DECAYS, **HARD,
        )  # fmt: skip
    want = by_float64(data, 3.0, 1e-2, 1.0, made["param"])
    found = {name: units(made[name], value) for name, value in want.items()}
    assert max(found.values()) <= 1.0, found


def drift(choice: str, steps: int, gradients: list[Tensor], want: list[Tensor]) -> float:
    """RMS distance of the weights from float64 after so many steps of one backend."""
    param = want[0].clone()
    if choice == "torch":
        leaf = param.clone().requires_grad_()
        optimizer = torch.optim.AdamW([leaf], lr=1e-3, fused=True, **HARD)
        for g in gradients:
            leaf.grad = g
            optimizer.step()
        param = leaf.detach()
    else:
        state = [torch.zeros_like(param) for _ in range(2)]
        count = torch.zeros(())
        with kernels.use_backend(choice):
            for g in gradients:
                kernels.adamw_ema(
                    [param], [g], *([s] for s in state), [], [count], lr=1e-3, ema_decays=[], **HARD
                )
    return float((param.double() - want[1]).square().mean().sqrt())


def test_a_thousand_steps_stay_as_near_float64_as_torchs_fused_adamw() -> None:
    g = torch.Generator().manual_seed(5)
    start = torch.randn(2000, generator=g)
    common = torch.randn(2000, generator=g)
    found = [common + torch.randn(2000, generator=g) for _ in range(1000)]
    leaf = start.double().requires_grad_()
    exact = torch.optim.AdamW([leaf], lr=1e-3, foreach=False, **HARD)
    for gradient in found:
        leaf.grad = gradient.double()
        exact.step()
    want = [start, leaf.detach()]
    theirs = drift("torch", 1000, found, want)
    for choice in ("reference", *(("cpp",) if backends.HAS_CPP else ())):
        assert drift(choice, 1000, found, want) <= 1.1 * theirs, choice


@pytest.mark.parametrize("choice", [pytest.param("cpp", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_new_weights(choice: str, low: torch.dtype) -> None:
    """float16 copies run the reference."""
    state, plain = make(torch.float32), make(torch.float32)
    copies = [torch.full_like(p, float("nan"), dtype=low) for p in state["params"]]
    with kernels.use_backend(choice):
        take(state, gradients(torch.float32, 0), copies=copies)
        take(plain, gradients(torch.float32, 0))
        for new, p, q in zip(copies, state["params"], plain["params"], strict=True):
            assert torch.equal(new, p.to(low)) and torch.equal(p, q)
        before = [c.clone() for c in copies]
        take(state, gradients(torch.float32, 1), copies=copies, found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(copies, before, strict=True))


@needs_cpp
def test_channels_last_weights_keep_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements are matched by memory where all tensors share an order, by index where not."""
    from etude.kernels import optimizer

    calls = []
    launch = optimizer._launch_cpp
    monkeypatch.setattr(
        optimizer, "_launch_cpp", lambda *args: (calls.append(1), launch(*args)) and None
    )
    g = torch.Generator().manual_seed(3)
    plain = [torch.randn(3, 4, 2, 5, generator=g).abs() for _ in range(5)]
    last = [t.clone(memory_format=torch.channels_last) for t in plain]
    mixed = [last[0].clone(), plain[1].clone(), *(t.clone() for t in last[2:])]
    for lists in (plain, last, mixed):
        param, grad, m, v, ema = lists
        kernels.adamw_ema(
            [param], [grad], [m], [v], [[ema]], [torch.zeros(())], ema_decays=[0.9], **SETTINGS
        )
    assert len(calls) == 2  # the gradient of the third lies in another order: the reference
    for i in (0, 2, 3, 4):
        assert torch.equal(plain[i], last[i])
        torch.testing.assert_close(mixed[i], plain[i], rtol=1e-6, atol=0)


@needs_cpp
def test_autograd_sees_that_weights_changed() -> None:
    leaf = torch.ones(3, requires_grad=True)
    loss = (leaf * leaf).sum()
    state = [torch.zeros(3) for _ in range(2)]
    kernels.adamw_ema(
        [leaf], [torch.ones(3)], [state[0]], [state[1]], [], [torch.zeros(())],
        ema_decays=[], **SETTINGS,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def operator_arguments() -> tuple:
    """Arguments of `torch.ops.etude.adamw_ema` for two tensors, one profile and copies."""

    def two(make_one) -> list[Tensor]:
        return [make_one(5), make_one(3, 2)]

    return (
        two(torch.randn), two(torch.randn), two(torch.randn), two(torch.rand), two(torch.randn),
        [torch.zeros(()), torch.ones(())], [t.bfloat16() for t in two(torch.zeros)],
        torch.tensor(1e-3), [torch.tensor(0.9)], torch.tensor(0.5), torch.tensor(0.0),
        0.9, 0.99, 1e-8, 0.1,
    )  # fmt: skip


@needs_cpp
def test_the_operator_is_registered_as_torch_wants_it() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.etude.adamw_ema.default,
        operator_arguments(),
        test_utils=(*tests, "test_aot_dispatch_dynamic"),
    )


@needs_cpp
def test_torch_compile_gives_the_bits_of_eager() -> None:
    eager, compiled = make(torch.float32), make(torch.float32)
    grads = gradients(torch.float32, 0)
    copies = [[p.bfloat16() for p in s["params"]] for s in (eager, compiled)]
    rate, scale, bad = torch.tensor(2e-3), torch.tensor(0.5), torch.tensor(0.0)

    def step(state: dict[str, list], low: list[Tensor]) -> None:
        take(state, grads, copies=low, lr=rate, grad_scale=scale, found_inf=bad)

    step(eager, copies[0])
    # aot_eager: what inductor would add is minutes of g++ on a slow machine
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, copies[1])
    for a, b in zip(flat(eager) + copies[0], flat(compiled) + copies[1], strict=True):
        assert torch.equal(a, b)


@needs_cpp
def test_verification_compares_and_leaves_the_right_state() -> None:
    state, want = make(torch.float32), make(torch.float32)
    grads = gradients(torch.float32, 0)
    with kernels.use_backend("cpp", verify=True):
        take(state, grads)
    with kernels.use_backend("reference"):
        take(want, grads)
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(want), strict=True))


@needs_cpp
def test_verification_finds_a_wrong_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.kernels import optimizer

    monkeypatch.setattr(optimizer, "_launch_cpp", wrong_launch(optimizer._launch_cpp))
    with kernels.use_backend("cpp", verify=True), pytest.raises(AssertionError, match="differs"):
        take(make(torch.float32), gradients(torch.float32, 0))


def wrong_launch(launch):
    """The twin, with the second tensor a little off."""

    def run(params: list[Tensor], *more) -> None:
        launch(params, *more)
        params[1].add_(1e-3)

    return run
