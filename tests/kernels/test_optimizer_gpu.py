"""The Triton twin of `adamw_ema` on a real GPU: accuracy, bits, CUDA graphs; run by `make gpu`."""

import gc

import pytest
import torch
from torch import Tensor

from etude import AdamWEMA, kernels

pytestmark = pytest.mark.gpu
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
DECAYS = (0.9, 0.9999)
SIZES = (1, 511, 512, 513, 40_000, 1_000_003)


def hard(count: int, seed: int) -> dict[str, Tensor]:
    """Magnitudes over twelve decades; in a third of the first moment's sums the terms cancel."""
    g = torch.Generator("cuda").manual_seed(seed)

    def uniform(size: int, low: float, high: float) -> Tensor:
        u = torch.rand(size, generator=g, dtype=torch.float64, device="cuda")
        return u * (high - low) + low

    def wide(low: float, high: float) -> Tensor:
        return 10 ** uniform(count, low, high) * uniform(count, -1, 1).sign()

    names = ("param", "grad", "exp_avg", "ema0", "ema1")
    made = {name: wide(-9, 3).float() for name in names}
    third = count // 3
    off = 1 + 10 ** uniform(third, -6, -1)
    made["exp_avg"][:third] = (made["grad"][:third].double() * -0.1 / 0.9 * off).float()
    made["exp_avg_sq"] = wide(-18, 6).abs().float()
    made["exp_avg_sq"][third : third + 5] = 0.0
    return made


def units(got: Tensor, want: Tensor) -> float:
    size = want.abs().float()
    last = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
    return float(((got.double() - want).abs() / last.double()).max())


@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0.0, 999_999.0])
@pytest.mark.parametrize("lr", [1e-5, 1e-1])
def test_one_step_is_within_two_units_of_float64(low, step: float, lr: float) -> None:
    data = hard(1_000_003, int(step) % 7)
    if low is not None:
        data["grad"] = data["grad"].to(low).float()
    made = {name: t.clone() for name, t in data.items()}
    copy = torch.empty_like(made["param"], dtype=torch.bfloat16)
    with kernels.use_backend("triton"):
        kernels.adamw_ema(
            [made["param"]], [made["grad"].to(low or torch.float32)], [made["exp_avg"]],
            [made["exp_avg_sq"]], [[made["ema0"]], [made["ema1"]]],
            [torch.tensor(step, device="cuda")], [copy],
            lr=lr, ema_decays=DECAYS, grad_scale=0.37, **SETTINGS,
        )  # fmt: skip
    wide, t = {k: v.double() for k, v in data.items()}, step + 1
    (beta1, beta2), eps = SETTINGS["betas"], SETTINGS["eps"]
    g = wide["grad"] * 0.37
    m = beta1 * wide["exp_avg"] + (1 - beta1) * g
    v = beta2 * wide["exp_avg_sq"] + (1 - beta2) * g * g
    bottom = v.sqrt() / (1 - beta2**t) ** 0.5 + eps
    p = wide["param"] * (1 - lr * 0.1) - lr / (1 - beta1**t) * m / bottom
    want = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    for k, decay in enumerate(DECAYS):
        want[f"ema{k}"] = decay * wide[f"ema{k}"] + (1 - decay) * made["param"].double()
    found = {name: units(made[name], value) for name, value in want.items()}
    assert max(found.values()) <= 2, found
    assert torch.equal(copy, made["param"].bfloat16())


def state(seed: int = 0, shift: int = 0) -> dict[str, list]:
    g = torch.Generator("cuda").manual_seed(seed)

    def one(size: int) -> Tensor:
        return torch.rand(size + shift, generator=g, device="cuda")[shift:]

    made = {k: [one(n) for n in SIZES] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    made["emas"] = [[one(n) for n in SIZES] for _ in DECAYS]
    made["copies"] = [p.bfloat16() for p in made["params"]]
    made["steps"] = [torch.full((), float(i), device="cuda") for i in range(len(SIZES))]
    return made


def flat(made: dict[str, list]) -> list[Tensor]:
    return [t for k, v in made.items() for t in (sum(v, []) if k == "emas" else v)]


def take(made: dict[str, list], **changes: object) -> None:
    kernels.adamw_ema(**made, **(SETTINGS | {"lr": 1e-2, "ema_decays": DECAYS} | changes))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_tensors_at_once_equal_the_reference_and_repeat(shift: int, grad) -> None:
    runs = [state(1, shift) for _ in range(3)]
    for made, backend in zip(runs, ("triton", "triton", "reference"), strict=True):
        made["grads"] = [g.to(grad) for g in made["grads"]]
        with kernels.use_backend(backend):
            for _ in range(3):
                take(made, grad_scale=torch.tensor(0.5, device="cuda"))
    for a, b, c in zip(*map(flat, runs), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-6 if a.dtype == torch.float32 else 1e-2, atol=1e-9)


def test_found_inf_leaves_every_bit() -> None:
    made = state(2)
    before = [t.clone() for t in flat(made)]
    with kernels.use_backend("triton"):
        take(made, found_inf=torch.ones((), device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(flat(made), before, strict=True))


def test_nothing_is_read_by_the_host() -> None:
    """Neither in the first call, which builds the tables, nor in later ones."""
    made, scalar = state(3), torch.ones((), device="cuda")
    with kernels.use_backend("triton"):
        take(state(4), found_inf=scalar * 0)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                take(made, lr=scalar * 1e-3, grad_scale=scalar, found_inf=scalar * 0)
                take(made)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_eager_steps_bit_for_bit() -> None:
    """Gradients get new memory inside the graph; tables of eager calls are driven out meanwhile."""
    eager, recorded = state(5), state(5)
    source = [torch.rand_like(g) for g in eager["grads"]]
    lr, found = torch.tensor(1e-2, device="cuda"), torch.zeros((), device="cuda")

    def step(made: dict[str, list]) -> None:
        made["grads"] = [g * 2 for g in source]
        take(made, lr=lr, found_inf=found)

    with kernels.use_backend("triton"):
        step(state(6))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(recorded)
        for k in range(20):
            take(state(k))
        gc.collect()
        for k in range(3):
            lr.fill_(1e-2 * (k + 1))
            found.fill_(float(k == 1))
            for g in source:
                g.mul_(1.5)
            step(eager)
            graph.replay()
    for name in ("params", "exp_avgs", "exp_avg_sqs", "copies", "steps"):
        for a, b in zip(eager[name], recorded[name], strict=True):
            assert torch.equal(a, b), name
    assert float(recorded["steps"][1]) == 3.0


def test_torch_compile_gives_the_bits_of_eager() -> None:
    eager, compiled = state(7), state(7)
    torch._dynamo.reset()
    lr = torch.tensor(1e-2, device="cuda")
    with kernels.use_backend("triton"):
        take(eager, lr=lr)
        torch.compile(take, fullgraph=True)(compiled, lr=lr)
    assert all(torch.equal(a, b) for a, b in zip(flat(eager), flat(compiled), strict=True))


def test_a_tensor_beyond_two_to_the_31_elements() -> None:
    """As a flat ZeRO partition may be; its last elements against a small call on them alone."""
    size, tail = 2**31 + 1027, 5000
    if torch.cuda.mem_get_info()[0] < size * 14 + 2**30:
        pytest.skip("needs 31 GB of free GPU memory")
    whole = [torch.full((size,), x, device="cuda") for x in (0.5, 0.01, 0.02)]
    grad = torch.full((size,), 0.25, device="cuda", dtype=torch.bfloat16)
    g = torch.Generator("cuda").manual_seed(0)
    for t in (*whole, grad):
        t[-tail:] = torch.rand(tail, generator=g, device="cuda").to(t.dtype)
    parts, part = [t[-tail:].clone() for t in whole], grad[-tail:].clone()
    with kernels.use_backend("triton"):
        for (p, m, v), g in ((whole, grad), (parts, part)):
            kernels.adamw_ema(
                [p], [g], [m], [v], [], [torch.zeros((), device="cuda")],
                lr=1e-2, ema_decays=[], **SETTINGS,
            )  # fmt: skip
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a[-tail:], b)
        assert (a[: -tail : 2**20] == a[0]).all() and a[0] not in (0.5, 0.01, 0.02)


def test_the_optimizer_updates_a_model_on_the_gpu_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    nets = [torch.nn.Linear(64, 33) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].cuda()
    optimizers = [AdamWEMA(n.parameters(), lr=1e-2, ema_decays=[0.9]) for n in nets]
    x = torch.randn(10, 16, 64)
    for batch in x:
        for net, optimizer in zip(nets, optimizers, strict=True):
            device = net.weight.device
            net(batch.to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)
        mine, theirs = optimizers[0].ema_state()[a], optimizers[1].ema_state()[b]
        torch.testing.assert_close(mine, theirs.cpu(), rtol=1e-4, atol=1e-5)
