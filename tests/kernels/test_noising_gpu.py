"""Noise, noising and losses on a real GPU, against the float64 reference; run by `make gpu`."""

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import noising, philox

pytestmark = pytest.mark.gpu
KEY = {"seed": 0xFFFFFFF3, "stream": 0xF0000008}
# RMS of the error over RMS of the value: float32 roundings, or one of the output.
RATIO = {torch.float32: 3e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
SHAPES = [(64, 4, 32, 32), (3, 16, 9, 11), (5, 1), (1, 1, 1, 1), (1, 3, 256, 256)]


def make(shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    count = shape[0]
    t = torch.rand(count, generator=g) * 0.8 + 0.1
    bound = torch.stack((0.02 + t * 0.05, -10 + t, -6 + t, torch.zeros(count)), 1)
    bound[::2, 3], bound[::2, 0] = 1.0, 1e-2
    wide = (count, shape[1] * (1 + double), *shape[2:])
    made = {
        "prediction": torch.randn(wide, generator=g).to(dtype),
        "x0": torch.randn(shape, generator=g).to(dtype) * 0.6,
        "positions": torch.arange(count) * 12_345_678_901 + (1 << 40),
        "alpha": 1 - t,
        "sigma": t,
        "weight": torch.rand(count, generator=g) + 0.5,
        "bound": bound,
    }
    return {name: value.cuda() for name, value in made.items()}


def loss(data: dict[str, Tensor], target: str, learned: bool) -> list[Tensor]:
    leaf = data["prediction"].detach().requires_grad_()
    noised = [data[k] for k in ("x0", "positions", "alpha", "sigma")]
    bound = data["bound"] if learned else None
    made = kernels.diffusion_loss(
        leaf, *noised, **KEY, target=target, weight=data["weight"], bound=bound
    )
    made.backward(torch.linspace(0.5, 2, len(made), dtype=made.dtype, device="cuda"))
    return [made.detach(), *leaf.grad.chunk(2, 1)[: 1 + learned]]


def in_float64(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in data.items()}


def ratio(got: Tensor, want: Tensor) -> float:
    error = (got.double() - want.double()).square().mean().sqrt()
    return float(error / want.double().square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_noise_and_noising(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    data = make(shape, dtype, False)
    if layout == "channels_last":
        if len(shape) != 4:
            pytest.skip("channels-last is for four dimensions")
        data["x0"] = data["x0"].contiguous(memory_format=torch.channels_last)
    given = [data[k] for k in ("x0", "positions", "alpha", "sigma")]
    with kernels.use_backend("triton"):
        eps = kernels.noise_like(data["x0"], data["positions"], **KEY)
        noisy = kernels.diffuse(*given, **KEY)
        again = kernels.diffuse(*given, **KEY)
    # The reference on the CPU, whose words have known answers.
    where = data["positions"].cpu()
    want = philox.normals(KEY["seed"], KEY["stream"], where, shape[1:]).cuda()
    if dtype == torch.float32:
        assert float((eps - want).abs().max()) < 3e-6
    assert torch.equal(noisy, again)
    assert ratio(eps, want) < RATIO[dtype]
    alpha, sigma = (data[k].double().view(-1, *[1] * (len(shape) - 1)) for k in ("alpha", "sigma"))
    assert ratio(noisy, alpha * data["x0"].double() + sigma * want) < RATIO[dtype]
    assert noisy.stride() == data["x0"].stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize(
    ("target", "learned"), [(t, False) for t in noising.TARGETS] + [("eps", True)]
)
def test_losses(shape: tuple[int, ...], dtype: torch.dtype, target: str, learned: bool) -> None:
    data = make(shape, dtype, learned)
    with kernels.use_backend("triton"):
        got, again = loss(data, target, learned), loss(data, target, learned)
    with kernels.use_backend("reference"):
        want = loss(in_float64(data), target, learned)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert ratio(got[0], want[0]) < RATIO[torch.float32]
    assert ratio(got[1], want[1]) < RATIO[dtype]
    if learned:
        assert ratio(got[2], want[2]) < 10 * RATIO[dtype]


def test_a_sample_has_the_same_bits_in_any_batch() -> None:
    data = make((64, 4, 32, 32), torch.bfloat16, True)
    one = {k: v[7:8] for k, v in data.items()}
    with kernels.use_backend("triton"):
        assert torch.equal(loss(data, "eps", True)[0][7:8], loss(one, "eps", True)[0])


def test_the_step_compiles_and_never_waits_for_the_gpu() -> None:
    data = make((8, 4, 32, 32), torch.bfloat16, False)
    given = [data[k] for k in ("x0", "positions", "alpha", "sigma")]

    def step(p: Tensor) -> tuple[Tensor, Tensor]:
        noisy = kernels.diffuse(*given, **KEY, dtype=torch.float32)
        return noisy, kernels.diffusion_loss(p, *given, **KEY, target="flow")

    torch._dynamo.reset()
    leaves = [data["prediction"].detach().clone().requires_grad_() for _ in range(2)]
    with kernels.use_backend("triton"):
        made = torch.compile(step, fullgraph=True)(leaves[0])
        made[1].sum().backward()
        step(leaves[1])  # kernels are compiled before the watch begins
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = step(leaves[1])
            eager[1].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made[0], eager[0]) and torch.equal(made[1], eager[1])
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_addresses_beyond_two_to_the_31() -> None:
    """The last of 33,000 samples of 65,536 elements is drawn and written where it belongs."""
    count = 33_000
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * count * 65_536 * 2:
        pytest.skip("needs 9 GiB of GPU memory")
    x0 = torch.zeros(count, 4, 128, 128, dtype=torch.bfloat16, device="cuda")
    positions = torch.arange(count, device="cuda")
    scales = torch.ones(count, device="cuda")
    with kernels.use_backend("triton"):
        noisy = kernels.diffuse(x0, positions, scales, scales, **KEY)
        alone = kernels.diffuse(x0[-2:], positions[-2:], scales[-2:], scales[-2:], **KEY)
    assert torch.equal(noisy[-2:], alone)
    assert abs(float(alone.float().std()) - 1) < 0.01
