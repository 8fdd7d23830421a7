"""Resizing: bytes against Pillow itself, TensorFlow 1's rule against the rule written out."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import Tensor

from etude import kernels
from etude.kernels import backends, resizing

poisoned = pytest.mark.usefixtures("poisoned_empty")
needs_cpp = pytest.mark.skipif(not backends.HAS_CPP, reason="the C++ kernels are not built")
CHOICES = (pytest.param("cpp", marks=needs_cpp), "reference")
# (height, width) -> (height, width): up, down, mixed, odd, sides of one pixel, many taps, no change
SIZES = (
    ((64, 64), (96, 96)),
    ((64, 64), (24, 24)),
    ((33, 47), (50, 21)),
    ((21, 130), (40, 7)),
    ((1, 1), (5, 3)),
    ((1, 40), (17, 9)),
    ((37, 1), (1, 13)),
    ((300, 20), (2, 3)),
    ((19, 19), (19, 19)),
    ((17, 40), (17, 90)),
    ((70, 31), (20, 60)),
)


def pictures(
    count: int, size: tuple[int, int], channels: int = 3, seed: int = 0, extreme: bool = False
) -> Tensor:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return torch.from_numpy((x > 127).astype(np.uint8) * 255 if extreme else x)


def pillows(x: Tensor, size: tuple[int, int], filter: str, box=None) -> np.ndarray:
    """Pillow's own answer, channel by channel, so that any number of channels will do."""
    rule = getattr(Image.Resampling, filter.upper())
    made = [
        np.stack(
            [
                Image.fromarray(np.ascontiguousarray(plane)).resize(size[::-1], rule, box=box)
                for plane in np.moveaxis(picture, 2, 0)
            ],
            axis=2,
        )
        for picture in x.numpy()
    ]
    return np.stack(made)


def comparable(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Pillows below 13 always resample along the width first."""
    return int(PIL.__version__.split(".")[0]) >= 13 or not resizing.columns_first(*before, after)


@poisoned
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_bytes_are_pillows(choice: str, filter: str, before, after, channels: int) -> None:
    if not comparable(before, after):
        pytest.skip("this Pillow has another order of passes")
    for extreme in (False, True):
        x = pictures(2, before, channels, extreme=extreme)
        with kernels.use_backend(choice):
            got = kernels.resize(x, after, filter=filter)
        assert got.dtype == torch.uint8
        np.testing.assert_array_equal(got.numpy(), pillows(x, after, filter))


@poisoned
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("box", [(0, 0, 40, 30), (3.25, 7.5, 29.875, 28.0), (10, 2, 11, 3)])
def test_a_box_is_pillows(choice: str, box) -> None:
    x = pictures(1, (30, 40))
    for size in ((20, 25), (64, 50), (2, 90)):
        with kernels.use_backend(choice):
            got = kernels.resize(x, size, box=box)
        if comparable((30, 40), size):
            np.testing.assert_array_equal(got.numpy(), pillows(x, size, "bicubic", box))


def test_tables_sum_to_one_and_are_read_only() -> None:
    for inputs, outputs in ((256, 299), (1000, 7), (7, 1000), (1, 1)):
        bounds, taps = resizing.weights("bicubic", inputs, 0.0, float(inputs), outputs)
        assert np.abs(taps.sum(1) - (1 << resizing.BITS)).max() <= taps.shape[1]
        assert (bounds[:, 0] >= 0).all() and (bounds.sum(1) <= inputs).all()
        assert not taps.flags.writeable


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("before", "after"), [((8, 9), (20, 31)), ((20, 50), (8, 6)), ((5, 1), (60, 4))]
)
def test_tf1_is_the_rule_written_out(choice: str, before, after) -> None:
    x = pictures(1, before, 1)
    grid = x[0, :, :, 0].numpy().astype(np.float64)
    expected = np.zeros(after)
    for i in range(after[0]):
        for j in range(after[1]):
            y, z = i * before[0] / after[0], j * before[1] / after[1]
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, before[0] - 1), min(z0 + 1, before[1] - 1)
            upper = grid[y0, z0] + (grid[y0, z1] - grid[y0, z0]) * (z - z0)
            lower = grid[y1, z0] + (grid[y1, z1] - grid[y1, z0]) * (z - z0)
            expected[i, j] = upper + (lower - upper) * (y - y0)
    with kernels.use_backend(choice):
        found = kernels.resize(x, after, filter="tf1", dtype=torch.float32)[0, :, :, 0]
    # A position is i * (n / m) in float32: off by 2^-24 of at most 50, times differences of 255.
    np.testing.assert_allclose(found.numpy(), expected / 255.0, atol=2e-5)


@poisoned
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("filter", resizing.FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalised_output(choice: str, filter: str, dtype: torch.dtype) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = pictures(3, (40, 33))
    with kernels.use_backend(choice):
        got = kernels.resize(
            x, (29, 50), filter=filter, mean=mean, std=std, dtype=dtype, out_layout="BCHW"
        )
        if filter == "tf1":
            plain = kernels.resize(x, (29, 50), filter=filter, dtype=torch.float32).double()
        else:
            plain = kernels.resize(x, (29, 50), filter=filter).double() / 255
    assert got.is_contiguous() and got.dtype == dtype and got.shape == (3, 3, 29, 50)
    want = (plain - torch.tensor(mean).double()) / torch.tensor(std).double()
    # scale and offset are rounded once, then a product and a sum: 4 roundings of values below 4.5
    # on the way; then the dtype's own.
    unit = torch.finfo(dtype).eps / 2
    error = (got.permute(0, 2, 3, 1).double() - want).abs()
    assert float((error - unit * want.abs()).max()) < 4 * 4.5 * 2.0**-24 + 1e-7


def test_inceptions_normalisation_is_exact() -> None:
    x = pictures(2, (16, 16))
    middle = (128 / 255,)
    got = kernels.resize(x, (16, 16), filter="tf1", mean=middle, std=middle, dtype=torch.float32)
    assert torch.equal(got, (x.float() - 128) / 128)


@poisoned
@needs_cpp
@pytest.mark.parametrize("filter", resizing.FILTERS)
def test_layouts_strides_and_lists_give_the_same_bits(filter: str) -> None:
    dtype = torch.float32
    rest = {"filter": filter, "dtype": dtype, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
    x = pictures(3, (37, 41))
    want = kernels.resize(x, (30, 52), **rest)
    assert want.is_contiguous()
    # The C++ kernel makes the reference's bits: no contraction, and whole-number sums.
    with kernels.use_backend("reference"):
        assert torch.equal(kernels.resize(x, (30, 52), **rest), want)
    planes = x.permute(0, 3, 1, 2).contiguous()
    sliced = torch.stack([x, x], -1)[..., 0]  # columns and channels with gaps
    turned = x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    for other in (sliced, turned, planes.permute(0, 2, 3, 1)):
        assert torch.equal(kernels.resize(other, (30, 52), **rest), want)
    for to in ("BCHW", "channels_last"):
        got = kernels.resize(planes, (30, 52), layout="BCHW", out_layout=to, **rest)
        assert torch.equal(got, want.permute(0, 3, 1, 2))
        assert got.is_contiguous(
            memory_format=torch.channels_last if to == "channels_last" else torch.contiguous_format
        )
    grey = x[..., :1].expand(-1, -1, -1, 3)
    assert torch.equal(
        kernels.resize(grey, (30, 52), **rest), kernels.resize(grey.clone(), (30, 52), **rest)
    )
    assert torch.equal(kernels.resize(list(x), (30, 52), **rest), want)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("to", ["BHWC", "BCHW"])
def test_a_list_of_pictures_of_any_sizes_and_boxes(choice: str, to: str) -> None:
    whole = pictures(1, (60, 80))[0]
    cut = whole[5:50, 11:30]  # a crop is a view: nothing outside it is read
    images = [whole, cut, pictures(1, (3, 200))[0], whole]
    boxes = [(0, 0, 80, 60), (0, 0, 19, 45), (50, 0, 150, 3), (1.5, 2.5, 33, 44)]
    with kernels.use_backend(choice):
        got = kernels.resize(images, (32, 24), box=boxes, out_layout=to)
    got = got.permute(0, 2, 3, 1) if to == "BCHW" else got
    for image, box, found in zip(images, boxes, got, strict=True):
        if comparable(tuple(image.shape[:2]), (32, 24)):
            want = pillows(image[None].clone(), (32, 24), "bicubic", box)[0]
            np.testing.assert_array_equal(found.numpy(), want)


@poisoned
@needs_cpp
def test_threads_levels_and_bands_do_not_matter() -> None:
    x = pictures(1, (130, 70))
    before = torch.get_num_threads()
    for filter, dtype in (("bicubic", torch.uint8), ("tf1", torch.float32)):
        want = None
        for level in backends.cpp().levels():
            kept = backends.cpp().set_level(level)
            try:
                for threads in (1, 3, 7):
                    torch.set_num_threads(threads)
                    for images in (x, x.expand(4, -1, -1, -1)):
                        got = kernels.resize(images, (61, 99), filter=filter, dtype=dtype)[-1]
                        want = got if want is None else want
                        assert torch.equal(got, want), (level, threads)
            finally:
                torch.set_num_threads(before)
                backends.cpp().set_level(kept)


@needs_cpp
def test_bfloat16_is_the_float32_result_rounded() -> None:
    x = pictures(2, (31, 30))
    wide = kernels.resize(x, (50, 40), dtype=torch.float32)
    assert torch.equal(kernels.resize(x, (50, 40), dtype=torch.bfloat16), wide.bfloat16())


@pytest.mark.parametrize("choice", CHOICES)
def test_no_pictures_and_no_channels(choice: str) -> None:
    with kernels.use_backend(choice):
        assert kernels.resize(pictures(0, (8, 8)), (4, 5)).shape == (0, 4, 5, 3)
        assert kernels.resize(pictures(2, (8, 8), 0), (4, 5)).shape == (2, 4, 5, 0)


@needs_cpp
def test_compiles_without_a_break_and_keeps_the_rules() -> None:
    x = pictures(2, (20, 24))

    def call(x: Tensor) -> Tensor:
        return kernels.resize(x, (12, 30), dtype=torch.float32, out_layout="BCHW") * 2

    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    rest = ([12, 30], "bilinear", [], [0.5], [0.25], torch.float32, True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(resizing.ops.resize.default, (x, *rest), test_utils=tests)
    torch.library.opcheck(
        resizing.ops.resize_list.default, ([x[0], x[1, :9]], *rest), test_utils=tests
    )


@needs_cpp
def test_verification_sees_one_wrong_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    x = pictures(1, (20, 24))
    with kernels.use_backend("cpp", verify=True):
        kernels.resize(x, (12, 30))
        exact = resizing.resize_reference

        def off_by_one(*args, **kwargs):
            made = exact(*args, **kwargs)
            made[0, 3, 4, 1] ^= 1
            return made

        monkeypatch.setattr(resizing, "resize_reference", off_by_one)
        with pytest.raises(AssertionError, match=r"picture 0 differs first at \[3, 4, 1\]"):
            kernels.resize(x, (12, 30))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(2, 8, 8, 3)}, "must be uint8"),
        ({"images": torch.zeros(8, 8, 3, dtype=torch.uint8)}, "a tensor of 4 dimensions"),
        ({"images": []}, "list of pictures is empty"),
        ({"images": torch.zeros(2, 0, 8, 3, dtype=torch.uint8)}, "8 x 0 pixels"),
        ({"size": (0, 4)}, "got (0, 4)"),
        ({"filter": "lanczos"}, "use one of bicubic, bilinear, tf1"),
        ({"filter": "tf1"}, "ask for a float dtype"),
        ({"box": (0, 0, 9, 8)}, "not inside 8 x 8"),
        ({"box": [(0, 0, 8, 8)]}, "need a list of as many pictures"),
        ({"mean": (1.0, 2.0)}, "2 values for 3 channels"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"layout": "HWC"}, "got HWC and HWC"),
    ],
)
def test_bad_input_gets_one_sentence(change: dict, words: str) -> None:
    good = {"images": pictures(2, (8, 8)), "size": (4, 4)}
    with pytest.raises(ValueError) as caught:
        kernels.resize(**(good | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
