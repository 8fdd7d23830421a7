"""Extractors' networks and preprocessing against torchvision 0.28.0 and timm 1.0.31.

What the peers give lies in `backbones.npz`, so that nothing of them is needed; it was made by

    python tests/peers/make_backbones.py

with equal weights, drawn by name, on both sides.
"""

import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from etude.metrics.extractors import Backbone, Extractor
from etude.metrics.extractors.preparing import HALF, IMAGENET, cut_from_shorter

# The peer's network -> the extractor and its options.
KINDS = {
    "inception_torchvision": ("inception_torchvision", {}),
    "resnet50": ("resnet50", {}),
    "keras": ("resnet50", {}),
    "mobilenet": ("mobilenet", {}),
    "vgg16": ("vgg16", {}),
    "convnext": ("convnext", {}),
    "dinov2": ("dinov2", {"input_size": 56}),
}


def load_script():
    place = Path(__file__).parent / "make_backbones.py"
    spec = importlib.util.spec_from_file_location("make_backbones", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load_script()


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(made.FILE) as file:
        return dict(file)


def opened(name: str, folder: Path, stored: dict[str, np.ndarray]) -> Backbone:
    state = made.state(json.loads(str(stored[f"{name} shapes"])))
    kind, options = KINDS[name]
    if name == "keras":
        save_file(state, folder / "weights.safetensors", {"variant": "keras"})
    else:
        if name == "dinov2":  # the publisher's file has no head; it has a mask token
            state = {n: v for n, v in state.items() if not n.startswith("head.")}
            state["mask_token"] = torch.zeros(1, 64)
        torch.save(state, folder / "weights.pth")  # keeps views of few numbers small
    return Extractor(kind, folder, **options).backbone


@pytest.mark.parametrize("name", list(KINDS))
def test_features_and_logits_are_the_peers(name, tmp_path, stored) -> None:
    backbone = opened(name, tmp_path, stored)
    with torch.no_grad():
        found = backbone(made.input_of(name), tuple(backbone.taps))
    features = stored[f"{name} features"]
    assert backbone.taps[next(iter(backbone.taps))] == len(features)
    ours = found[next(iter(backbone.taps))]
    if name == "vgg16":  # taken before the ReLU there, whose input is dropout's output
        features = features.clip(min=0)
    close(ours[0].numpy(), features)
    if "logits" in found:
        close(found["logits"][0].numpy(), stored[f"{name} logits"])


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-5 of the largest, which float32 and folded normalisations leave."""
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", list(made.PREPARED))
def test_cropped_bytes_are_torchvisions_transforms(name, stored) -> None:
    height, width, shorter, size, filter = made.PREPARED[name]
    images = torch.from_numpy(made.picture(height, width))[None]
    seen = cut_from_shorter(images, shorter, size, filter, IMAGENET, torch.float32)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in IMAGENET)
    levels = (seen[0] * std + mean) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    levels = levels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    np.testing.assert_array_equal(levels[::16, ::16], stored[f"{name} some"])
    assert zlib.crc32(levels.tobytes()) == stored[f"{name} sum"]


def test_torchvisions_inception_levels_are_what_it_turns_imagenets_into() -> None:
    """x * (std / 0.5) + (mean - 0.5) / 0.5 of ImageNet's levels x, which it does in the network."""
    images = torch.from_numpy(made.picture(342, 342))[None]
    ours, theirs = (
        cut_from_shorter(images, 342, 299, "bilinear", levels, torch.float32)
        for levels in (HALF, IMAGENET)
    )
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in IMAGENET)
    torch.testing.assert_close(ours, theirs * (std / 0.5) + (mean - 0.5) / 0.5, rtol=0, atol=1e-6)
