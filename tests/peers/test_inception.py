"""Inception features against torch-fidelity 0.4.0, pytorch-fid 0.3.0 and clean-fid 0.1.35.

What the peers give lies in `inception.npz`, so that nothing of them is needed; it was made by

    python tests/peers/make_inception.py

with equal weights, drawn by name, and equal pictures on both sides; each from the file of a picture
to its features, in its own convention of resizing.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.metrics.extractors import Extractor
from etude.metrics.extractors.inception_network import Inception
from etude.metrics.extractors.inception_weights import torchvision_names


def load_script():
    place = Path(__file__).parent / "make_inception.py"
    spec = importlib.util.spec_from_file_location("make_inception", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load_script()


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(made.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The file that torch-fidelity's network was filled from."""
    shapes = {}
    network = Inception(classes=1008)
    for theirs, ours in torchvision_names().items():
        weight = network.get_submodule(ours).weight
        shapes[f"{theirs}.conv.weight"] = tuple(weight.shape)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{theirs}.bn.{name}"] = (len(weight),)
    shapes |= {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: made.value(name, shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(("resize", "count"), [("tf1", 7), ("pytorch", 4), ("clean", 1)])
def test_features_are_the_peers_within_1e_4(resize, count, stored, weights) -> None:
    names = [key for key in stored if key.startswith(f"{resize} ")]
    assert len(names) == count * len(made.SIZES)
    taps = sorted({key.split()[2] for key in names}, key=lambda tap: tap != "2048")
    extractor = Extractor("inception", weights, taps=taps, resize=resize, check=False)
    for number, picture in enumerate(made.pictures()):
        found = extractor.features(picture[None])
        for tap, features in zip(taps, found.values(), strict=True):
            expected = stored[f"{resize} {number} {tap}"]
            error = np.abs(features[0].numpy()[:: made.KEPT] - expected).max()
            assert error < 1e-4 * np.abs(expected).max(), (number, tap)


def test_the_three_conventions_differ_by_more(stored) -> None:
    """Or agreeing with each would say nothing."""
    for one, other in (("tf1", "pytorch"), ("tf1", "clean"), ("pytorch", "clean")):
        first, second = (stored[f"{rule} 1 2048"] for rule in (one, other))
        assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()
