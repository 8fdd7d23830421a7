"""The CUDA resizing kernels, thread by thread on the CPU: every output has the reference's bits."""

import numpy as np
import pytest
import torch
from torch import Tensor

from etude import kernels
from etude.kernels import backends, compiling_cuda, resizing, resizing_cuda

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (height, width) -> (height, width): up by several tiles, down, mixed, sides of one pixel, the
# height first, vectors of four outputs, a filter too wide for shared memory, no change.
SIZES = (
    ((64, 64), (96, 96)),
    ((64, 70), (25, 24)),
    ((33, 47), (50, 21)),
    ((1, 1), (5, 3)),
    ((1, 40), (17, 9)),
    ((37, 1), (1, 13)),
    ((70, 31), (20, 60)),
    ((40, 90), (32, 64)),
    ((900, 5), (3, 4)),
    ((1700, 4), (17, 5)),
    ((19, 19), (19, 19)),
)


def pictures(count: int, size: tuple[int, int], channels: int = 3, extreme: bool = False) -> Tensor:
    rng = np.random.default_rng(channels)
    x = rng.integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return torch.from_numpy((x > 127).astype(np.uint8) * 255 if extreme else x)


def expected(x: Tensor, size: tuple[int, int], layout: str = "BHWC", **rest) -> Tensor:
    want = resizing.resize_reference(x, size, **rest)
    return want if layout == "BHWC" else want.permute(0, 3, 1, 2)


@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_bytes_are_the_references(cuda, guarded, before, after, channels: int) -> None:
    for filter, layout in (("bicubic", "BHWC"), ("bilinear", "BCHW")):
        x = pictures(2, before, channels, extreme=layout == "BCHW")
        got = kernels.resize(x, after, filter=filter, out_layout=layout)
        assert torch.equal(got, expected(x, after, layout, filter=filter))


@pytest.mark.parametrize("filter", resizing.FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
def test_normalised_outputs_have_the_references_bits(cuda, guarded, filter, dtype, layout) -> None:
    rest = {"filter": filter, "mean": MEAN, "std": STD, "dtype": dtype}
    for before, after in (((40, 33), (29, 50)), ((40, 33), (35, 44)), ((60, 20), (9, 40))):
        x = pictures(2, before)
        got = kernels.resize(x, after, out_layout=layout, **rest)
        want = expected(x, after, layout, **rest)
        assert got.is_contiguous() and torch.equal(got, want)


def test_tf1_up_down_and_to_one(cuda, guarded) -> None:
    """A kept row is used again when enlarging, and is not when rows are left out."""
    for before, after in (
        ((8, 9), (70, 91)),
        ((90, 50), (8, 6)),
        ((1, 1), (3, 2)),
        ((9, 9), (1, 1)),
    ):
        x = pictures(2, before, 4)
        got = kernels.resize(x, after, filter="tf1", dtype=torch.float32)
        assert torch.equal(got, expected(x, after, filter="tf1", dtype=torch.float32))


def test_a_box_and_any_strides(cuda, guarded) -> None:
    x = pictures(3, (30, 40))
    box = (3.25, 7.5, 29.875, 28.0)
    planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    gaps = torch.stack([x, 255 - x], -1)[..., 0]
    turned = x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    grey = x[..., :1].expand(-1, -1, -1, 3)
    for size in ((20, 25), (64, 50), (2, 90)):
        for one in (x, planes, gaps, turned, grey, x.flip(2)[1:]):
            got = kernels.resize(one, size, box=box)
            assert torch.equal(got, resizing.resize_reference(one, size, box=box))
    got = kernels.resize(planes, (20, 25), filter="tf1", dtype=torch.float16)
    want = resizing.resize_reference(planes, (20, 25), filter="tf1", dtype=torch.float16)
    assert torch.equal(got, want)


def test_a_list_of_pictures_with_their_boxes(cuda) -> None:
    whole = pictures(1, (60, 80))[0]
    images, boxes = [whole, whole[5:50, 11:30]], [(1.5, 2.5, 33, 44), (0, 0, 19, 45)]
    got = kernels.resize(images, (32, 24), box=boxes, out_layout="BCHW")
    for image, box, found in zip(images, boxes, got, strict=True):
        want = resizing.resize_reference(image[None], (32, 24), box=box)[0]
        assert torch.equal(found.permute(1, 2, 0), want)


def test_every_row_tile_makes_the_same_bytes(cuda, monkeypatch) -> None:
    """The heuristic's tiles, all of them; two launches where it says none fits."""
    x = pictures(2, (50, 30))
    want = resizing.resize_reference(x, (77, 33))
    bounds, _ = resizing.weights("bicubic", 50, 0.0, 50.0, 77)
    seen = set()
    for rows in (0, 8, 16, 32, 64):
        starts = range(0, 77, rows or 77)
        ends = [bounds[s : s + rows].sum(1).max() for s in starts] if rows else [0]
        span = max(int(e) - int(bounds[s, 0]) for s, e in zip(starts, ends, strict=True))
        config = resizing_cuda.LaunchConfig(rows, span)
        monkeypatch.setattr(
            resizing_cuda.LaunchConfig, "for_shape", classmethod(lambda *_, made=config: made)
        )
        assert torch.equal(kernels.resize(x, (77, 33)), want)
        seen.add(rows)
    assert len(seen) == 5


def test_tiles_grow_with_the_batch_and_fit_shared_memory() -> None:
    config = resizing_cuda.LaunchConfig.for_shape
    enlarge = ("bicubic", 256, 0.0, 256.0, 299)
    assert config(7, *enlarge).rows == 8  # one picture: blocks for every multiprocessor first
    assert config(7 * 256, *enlarge) == resizing_cuda.LaunchConfig(64, 58)
    assert config(1, "bicubic", 40_000, 0.0, 40_000.0, 64).rows == 0
    few = config(7 * 256, "bicubic", 4096, 0.0, 4096.0, 256)
    assert few.rows == 16 and few.span * 128 <= resizing_cuda._SHARED


def test_same_bytes_in_every_order_of_threads_and_blocks(cuda, built) -> None:
    x, runs = pictures(2, (40, 50)), []
    for order in (0, 1, 2, 3):
        built[1].cuda_on_cpu_order(order)
        try:
            runs.append(kernels.resize(x, (64, 47)))
        finally:
            built[1].cuda_on_cpu_order(0)
    assert all(torch.equal(runs[0], other) for other in runs)


def test_no_pictures_and_no_channels(cuda) -> None:
    assert kernels.resize(pictures(0, (8, 8)), (4, 5)).shape == (0, 4, 5, 3)
    assert kernels.resize(pictures(2, (8, 8), 0), (4, 5)).shape == (2, 4, 5, 0)


def test_the_extension_refuses_more_rows_than_shared_memory_holds(cuda) -> None:
    nothing = ([0] * 4, [0] * 4, (1, 8, 8, 3), -1, False, False)
    with pytest.raises(RuntimeError, match="too many rows"):
        cuda.resize_both(nothing, (0, 0, 1), (0, 0, 1), 8, 385, (0, 0))


def test_compiles_without_a_break_and_keeps_the_rules(cuda) -> None:
    x = pictures(2, (20, 24))

    def call(x: Tensor) -> Tensor:
        return kernels.resize(x, (12, 30), dtype=torch.float32, out_layout="BCHW") * 2

    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    rest = ([12, 30], "bilinear", [], [0.5], [0.25], torch.float32, True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(resizing.ops.cuda_resize.default, (x, *rest), test_utils=tests)


def test_verification_sees_one_wrong_byte(cuda, monkeypatch) -> None:
    x = pictures(1, (20, 24))
    monkeypatch.setattr(backends, "verifying", lambda: True)
    kernels.resize(x, (12, 30))
    exact = resizing.resize_reference

    def off_by_one(*args, **kwargs):
        made = exact(*args, **kwargs)
        made[0, 3, 4, 1] ^= 1
        return made

    monkeypatch.setattr(resizing, "resize_reference", off_by_one)
    with pytest.raises(AssertionError, match=r"CUDA resize: output picture 0 differs first"):
        kernels.resize(x, (12, 30))


def test_registers_and_spills() -> None:
    budget = compiling_cuda.budget("resizing")
    again = "type python -m etude.kernels.compiling_cuda resizing --write"
    assert budget.pop("sources") == compiling_cuda.sources_hash("resizing"), again
    assert all(row["spills"] == 0 for kernels_of in budget.values() for row in kernels_of.values())
    if compiling_cuda.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    for row in compiling_cuda.measure([compiling_cuda.SOURCES / "resizing.cu"]):
        if row["toolchain"] in budget:
            numbers = {k: row[k] for k in ("registers", "spills")}
            assert budget[row["toolchain"]][row["kernel"]] == numbers, row
