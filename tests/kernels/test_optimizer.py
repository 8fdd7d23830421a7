"""adamw_ema against torch.optim.AdamW in float64; the same bits at every level and slicing."""

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends

needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
SHAPES = [(37, 5), (1,), (), (16385,), (0, 3), (129, 129)]
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
DECAYS = (0.9, 0.999)


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
    ],
)
def test_lists_that_do_not_match(change: dict, words: str) -> None:
    state = make(torch.float32) | {k: v for k, v in change.items() if k != "ema_decays"}
    decays = {"ema_decays": change["ema_decays"]} if "ema_decays" in change else {}
    with pytest.raises(ValueError) as caught:
        take(state, gradients(torch.float32, 0), **decays)
    assert words in str(caught.value)
