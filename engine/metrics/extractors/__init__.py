"""Frozen networks that turn pictures into features; called by evaluation/extract.py.

An extractor takes uint8 pictures and does all its preprocessing itself, so that real and generated
pictures take exactly the same path. Adding one: a file here with a class of this shape, and its
name in `load_extractor`.
"""

import importlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from etude.core.errors import UserError

_KINDS = {
    "classifier": "classifier:ClassifierExtractor",
    "inception": "inception:InceptionExtractor",
    "pixels": "pixels:PixelExtractor",
}


@runtime_checkable
class Extractor(Protocol):
    """A frozen map from pictures to features.

    Attributes:
        name, version: what the features are; the version changes whenever the numbers do.
        weights_sha256: hash of the weights, "" for an extractor without any.
        input_size: side of the square picture that the network sees, pixels.
        resize: the rule that brings a picture to that size.
        channels: 1 or 3.
        dim: length of a feature vector.
    """

    name: str
    version: str
    weights_sha256: str
    input_size: int
    resize: str
    channels: int
    dim: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, dim) float32 of images (B, H, W, C) uint8 with C of 1 or 3."""
        ...

    def to(self, device: torch.device | str) -> "Extractor":
        """Move to a device; returns itself."""
        ...


def load_extractor(kind: str, weights: str | Path = "", *, input_size: int = 0) -> Extractor:
    """The extractor `kind`: "classifier" (folder), "inception" (file) or "pixels" (no weights).

    Args:
        weights: where the weights are.
        input_size: side that "pixels" compares pictures at; other kinds have their own.

    Raises:
        UserError: unknown kind, or weights that are missing or wrong.
    """
    if kind not in _KINDS:
        raise UserError(f"there is no extractor {kind!r}; choose one of {', '.join(_KINDS)}")
    module, name = _KINDS[kind].split(":")
    made = getattr(importlib.import_module(f".{module}", __name__), name)
    if kind == "pixels":
        return made(input_size)
    if not weights:
        raise UserError(f"the {kind} extractor needs weights; set extractor.weights=PATH")
    return made(Path(weights))


def preprocessing(extractor: Extractor) -> str:
    """One line that fixes how uint8 pictures reach the network; part of the store's key."""
    return f"{extractor.resize} to {extractor.input_size}, {extractor.channels} channels"


def to_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """uint8 (B, H, W, C) -> float32 (B, channels, H, W) in [0, 255]; grey is ITU-R BT.601 luma."""
    x = images.permute(0, 3, 1, 2).to(torch.float32)
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def resize_antialiased(x: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear with antialiasing, no rounding; (B, C, H, W) -> (B, C, size, size)."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
