"""Learners' networks and augmentations against timm 1.0.31 and torchvision 0.28.0.

What the peers give lies in `classifiers.npz`, so that nothing of them is needed; it was made by

    python tests/peers/make_classifiers.py

with equal weights, drawn by name, on both sides.
"""

import importlib.util
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from etude.data.mixing import Mix, cut, mixed, mixed_targets
from etude.data.randaugment import OPERATIONS, apply
from etude.models.resnet import ResNet, ResNetConfig
from etude.models.vit import ViT, ViTConfig


def load_script():
    place = Path(__file__).parent / "make_classifiers.py"
    spec = importlib.util.spec_from_file_location("make_classifiers", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = load_script()


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(made.FILE) as file:
        return dict(file)


def network(name: str) -> torch.nn.Module:
    classes = made.NETWORKS[name]
    if name == "vit":
        return ViT(
            ViTConfig(
                input_size=32, patch_size=8, hidden_size=48, depth=3, num_heads=4,
                num_classes=classes,
            )
        )  # fmt: skip
    return ResNet(ResNetConfig(depth=int(name[6:]), num_classes=classes))


@pytest.mark.parametrize("name", list(made.NETWORKS))
def test_logits_gradients_and_running_statistics_are_the_peers(name, stored) -> None:
    found = dict(made.measured(name, network(name)))
    assert found.keys() == {key for key in stored if key.split()[0] == name}
    for key, value in found.items():
        tolerance = 1e-5 if key.endswith("picture") else 1e-9  # stored in float32
        scale = np.abs(stored[key]).max(initial=0)
        assert np.abs(value - stored[key]).max(initial=0) <= tolerance * scale, key


@pytest.mark.parametrize("name", list(made.NETWORKS))
def test_float32_logits_are_the_peers_within_1e_5(name, stored) -> None:
    ours = network(name)
    ours.load_state_dict(made.state(ours))
    with torch.no_grad():
        logits = ours.eval()(made.input_of(name).float()).double().numpy()
    expected = stored[f"{name} eval logits"]
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["colour", "grey"])
def test_randaugments_operations_are_torchvisions_to_the_bit(kind, stored) -> None:
    images, sums = torch.from_numpy(made.pictures(kind)), []
    for number, name in enumerate(OPERATIONS):
        for negative in made.signs(number):
            for bin in range(31):
                out = apply(name, images, bin, np.full(2, negative), fill=60).numpy()
                sums.append(zlib.crc32(out.tobytes()))
                if bin == 9:
                    assert np.array_equal(out, stored[f"{kind} {name} {negative}"]), name
    assert sums == stored[f"{kind} sums"].tolist()


def test_mixup_and_cutmix_are_torchvisions(stored) -> None:
    """Its partner is the picture before, ours the one after: equal for the batch turned round."""
    x, labels = torch.from_numpy(made.drawn("mix", (3, 2, 8, 10))), torch.tensor([0, 2, 1])
    partners, others = x.roll(1, 0), labels.roll(1, 0)
    for number, (share, row, column) in enumerate(made.SHARES):
        for kind, mix in (
            ("cutmix", cut(share, (row, column), (8, 10))),
            ("mixup", Mix(share, None)),
        ):
            got = mixed(x, partners, mix).numpy()
            np.testing.assert_allclose(got, stored[f"{kind} {number} x"], rtol=0, atol=1e-12)
            targets = mixed_targets(labels, others, 3, mix.share).numpy()
            np.testing.assert_allclose(targets, stored[f"{kind} {number} y"], rtol=0, atol=1e-6)
