"""Resizing of 8-bit pictures: Pillow's rule to bytes and to a network's input, and TensorFlow's."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.case import Case, Inputs, Run
from etude import kernels

SOURCES = (
    "kernels/resizing.py",
    "kernels/resizing_triton.py",
    "kernels/resizing_cuda.py",
    "csrc/cpu/resizing.cpp",
    "csrc/cuda/resizing.cu",
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIDDLE = (128 / 255,)
CPU = {"16 x 256 to 299": (16, 256, 299), "16 x 512 to 224": (16, 512, 224)}
GPU = {"256 x 256 to 299": (256, 256, 299), "256 x 512 to 224": (256, 512, 224)}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """shape[0] colour pictures with sides of shape[1], to be brought to shape[2].

    Of middling contrast: torch's resize, which rounds only once, agrees where nothing is clipped.
    """
    count, side, size = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randint(96, 160, (count, side, side, 3), generator=g, dtype=torch.uint8)
    return {"images": x.to(device), "size": (size, size), "dtype": dtype}


def to_bytes(inputs: Inputs) -> Tensor:
    return kernels.resize(inputs["images"], inputs["size"])


def to_input(inputs: Inputs) -> Tensor:
    return kernels.resize(**inputs, mean=MEAN, std=STD, out_layout="BCHW")


def to_inception(inputs: Inputs) -> Tensor:
    return kernels.resize(
        **inputs, filter="tf1", mean=MIDDLE, std=MIDDLE, out_layout="channels_last"
    )


def pillow() -> Run:
    def run(inputs: Inputs) -> Tensor:
        rule = Image.Resampling.BICUBIC
        made = [
            np.asarray(Image.fromarray(picture).resize(inputs["size"], rule))
            for picture in inputs["images"].cpu().numpy()
        ]
        return torch.from_numpy(np.stack(made))

    return run


def by_torch() -> Run:
    """torch's antialiased bicubic, which does not round to bytes between."""

    def run(inputs: Inputs) -> Tensor:
        x = inputs["images"].permute(0, 3, 1, 2).float()
        x = torch.nn.functional.interpolate(x, inputs["size"], mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        return ((x.clamp(0, 255) / 255 - mean) / std).to(inputs["dtype"])

    return run


def moved(inputs: Inputs) -> int:
    """The pictures and the result; bytes between the passes are the implementation's affair."""
    images, (height, width) = inputs["images"], inputs["size"]
    return images.numel() + len(images) * height * width * 3 * inputs["dtype"].itemsize


def moved_bytes(inputs: Inputs) -> int:
    return moved(inputs | {"dtype": torch.uint8})


CASES = (
    Case(
        "resize",
        "bicubic to bytes",
        make,
        to_bytes,
        CPU,
        GPU,
        moved_bytes,
        dtypes=("float32",),
        sources=SOURCES,
        rivals={"Pillow": pillow},
        compiled=False,
    ),
    Case(
        "resize",
        "bicubic, normalised",
        make,
        to_input,
        CPU,
        GPU,
        moved,
        dtypes=("bfloat16",),
        sources=SOURCES,
        rivals={"torch interpolate": by_torch},
        compiled=False,
    ),
    Case(
        "resize",
        "TensorFlow 1 to Inception",
        make,
        to_inception,
        {"16 x 256 to 299": (16, 256, 299)},
        {"256 x 256 to 299": (256, 256, 299)},
        moved,
        sources=SOURCES,
    ),
)
