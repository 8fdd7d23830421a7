"""A sampler's step and bytes on a real GPU, against the float64 reference; run by `make gpu`."""

import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import solver

pytestmark = pytest.mark.gpu
SHAPES = [(64, 4, 32, 32), (3, 16, 9, 11), (5, 1), (1, 1, 1, 1), (2, 3, 256, 256)]
POINTS = [(0.28, 0.96), (0.6, 0.8), (0.8, 0.6)]


def row(method: str, prediction: str) -> Tensor:
    before, now, then = (torch.tensor(p, dtype=torch.float64).unbind() for p in POINTS)
    return solver.solver_coefficients(
        method, prediction, *now, *then, alpha_previous=before[0], sigma_previous=before[1]
    ).cuda()


def make(shape: tuple[int, ...], scales: int, dtype: torch.dtype, layout: str) -> dict:
    g = torch.Generator().manual_seed(0)
    count = shape[0]
    blocks = ((scales + 1) * count, 2 * shape[1], *shape[2:])
    made = {
        "x": torch.randn(shape, generator=g),
        "prediction": torch.randn(blocks, generator=g).to(dtype),
        "extra": torch.randn(shape, generator=g),
    }
    made = {k: v.cuda() for k, v in made.items()}
    if layout == "channels_last" and len(shape) == 4:
        made = {k: v.contiguous(memory_format=torch.channels_last) for k, v in made.items()}
    if scales:
        made["guidance"] = torch.rand(count, scales, generator=g).cuda() * 3
        made["guided_channels"] = 3
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scales", [0, 1, 2])
def test_step(shape: tuple[int, ...], dtype: torch.dtype, layout: str, scales: int) -> None:
    data = make(shape, scales, dtype, layout)
    method = solver.METHODS[scales]
    coefficients = row(method, "eps").expand(shape[0], 8)
    with kernels.use_backend("triton"):
        got = kernels.solver_step(**data, coefficients=coefficients)
        again = kernels.solver_step(**data, coefficients=coefficients)
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in data.items()}
    with kernels.use_backend("reference"):
        want = kernels.solver_step(**wide, coefficients=coefficients)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
        # Inputs of 16 bits are exact and outputs float32: a dozen roundings in every case.
        assert float((a.double() - c).norm() / c.norm()) < 2e-6


def test_a_loop_is_one_graph_that_follows_its_tables() -> None:
    """Captured once; with other weights and rows in the same memory it draws other pictures."""
    data = make((8, 4, 32, 32), 1, torch.bfloat16, "contiguous")
    rows = torch.stack([row("ddim", "flow"), row("ddim", "v"), row("ddim", "eps")]).float()
    weight = torch.tensor([1.5], device="cuda")

    def loop(x: Tensor) -> Tensor:
        for coefficients in rows.unbind(0):
            network = torch.cat((torch.sin(x), torch.cos(x)))
            x, _ = kernels.solver_step(x, network, coefficients, guidance=weight)
        return x

    with kernels.use_backend("triton"):
        loop(data["x"])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = loop(data["x"])
        for scale in (1.5, 0.25):
            weight.fill_(scale)
            rows.mul_(0.9)
            graph.replay()
            assert torch.equal(made, loop(data["x"]))


def test_the_step_compiles_and_never_waits_for_the_gpu() -> None:
    data = make((8, 4, 32, 32), 1, torch.bfloat16, "contiguous")
    coefficients = row("ddim", "eps").float()
    torch._dynamo.reset()
    with kernels.use_backend("triton"):
        compiled = torch.compile(kernels.solver_step, fullgraph=True)
        made = compiled(**data, coefficients=coefficients)
        kernels.solver_step(**data, coefficients=coefficients)
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = kernels.solver_step(**data, coefficients=coefficients)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made[0], eager[0]) and torch.equal(made[1], eager[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 256, 256), (1, 1, 5, 7), (2, 4, 31, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bytes(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    images = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.7).to(dtype)
    images = images.cuda()
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    with kernels.use_backend("triton"):
        got = kernels.to_uint8(images)
    assert torch.equal(got, kernels.to_uint8_reference(images))


def test_addresses_beyond_two_to_the_31() -> None:
    """The last of 33,000 samples, guided by a block of predictions beyond 2^31 elements."""
    count = 33_000
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * count * 65_536 * 4:
        pytest.skip("needs 52 GiB of GPU memory")
    x = torch.randn(count, 4, 128, 128, device="cuda")
    prediction = torch.randn(2 * count, 4, 128, 128, dtype=torch.bfloat16, device="cuda")
    coefficients, guidance = row("ddim", "eps").float(), torch.tensor([2.0], device="cuda")
    with kernels.use_backend("triton"):
        made, _ = kernels.solver_step(x, prediction, coefficients, guidance=guidance)
        alone, _ = kernels.solver_step(
            x[-2:], prediction[[count - 2, count - 1, 2 * count - 2, 2 * count - 1]],
            coefficients, guidance=guidance,
        )  # fmt: skip
    assert torch.equal(made[-2:], alone)
