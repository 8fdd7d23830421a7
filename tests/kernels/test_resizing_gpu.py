"""`resize` on a real GPU: bytes, layouts, sizes beyond 2^31 elements; run by `make gpu`."""

import pytest
import torch

from etude import kernels
from etude.kernels import backends

pytestmark = pytest.mark.gpu
no_cuda = pytest.mark.skipif(not backends.HAS_CUDA, reason="the CUDA kernels are not built")
each_twin = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=no_cuda)])
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(count: int, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *size, channels), generator=g, dtype=torch.uint8)


@each_twin
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((256, 256), (299, 299)),
        ((256, 256), (224, 224)),
        ((37, 501), (64, 20)),
        ((300, 20), (7, 9)),
    ],
    ids=str,
)
def test_bytes_are_the_references(backend: str, filter: str, before, after) -> None:
    x = pictures(3, before)
    with kernels.use_backend("reference"):
        want = kernels.resize(x, after, filter=filter)
    for source in (x, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        with kernels.use_backend(backend):
            got = kernels.resize(source.cuda(), after, filter=filter)
        assert torch.equal(got.cpu(), want)


@each_twin
@pytest.mark.parametrize("filter", ["bicubic", "tf1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_layout", ["BHWC", "BCHW", "channels_last"])
def test_normalised_output(backend: str, filter: str, dtype: torch.dtype, out_layout: str) -> None:
    rest = {"filter": filter, "mean": MEAN, "std": STD, "out_layout": out_layout}
    x = pictures(2, (256, 200))
    with kernels.use_backend("reference"):
        want = kernels.resize(x, (299, 299), dtype=torch.float32, **rest)
    with kernels.use_backend(backend):
        got = kernels.resize(x.cuda(), (299, 299), dtype=dtype, **rest)
        again = kernels.resize(x.cuda(), (299, 299), dtype=dtype, **rest)
    assert torch.equal(got, again) and got.dtype == dtype
    # Values reach 2.7; a fused multiply-add may round once where the reference rounds twice.
    bound = 2e-6 + torch.finfo(dtype).eps * want.abs()
    assert bool(((got.float().cpu() - want).abs() <= bound).all())


@each_twin
def test_a_batch_of_more_than_two_to_the_31_output_elements(backend: str) -> None:
    x = pictures(2, (16, 16)).cuda().repeat(2800, 1, 1, 1)  # 5600 x 360 x 360 x 3 = 2.18e9 bytes
    with kernels.use_backend(backend):
        out = kernels.resize(x, (360, 360))
        first = kernels.resize(x[:2], (360, 360))
    assert torch.equal(out[-2:], first)


@each_twin
def test_a_warm_call_does_not_synchronise(backend: str) -> None:
    x = pictures(2, (64, 64)).cuda()
    with kernels.use_backend(backend):
        want = kernels.resize(x, (50, 50), dtype=torch.bfloat16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = kernels.resize(x, (50, 50), dtype=torch.bfloat16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@each_twin
def test_compiles_without_a_break(backend: str) -> None:
    x = pictures(2, (64, 64)).cuda()
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return kernels.resize(x, (50, 50), dtype=torch.float32, out_layout="BCHW") * 2

    with kernels.use_backend(backend):
        assert torch.equal(torch.compile(call, fullgraph=True)(x), call(x))
