"""Classifiers by name, the linear probe, and networks of the user's own."""

import hashlib
import sys

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import nn

from etude.core.errors import UserError
from etude.metrics.extractors import Extractor
from etude.metrics.extractors.classifier import save_classifier
from etude.models.classifier import Classifier, ClassifierConfig
from etude.models.classifiers import (
    FAMILIES,
    ImportedConfig,
    LearnerModelConfig,
    build_classifier,
)
from etude.models.probe import Probe, ProbeConfig
from etude.models.resnet import ResNet, ResNetConfig

BACKBONE = ResNetConfig(width=8, num_classes=4, stem="small")


def pictures(channels: int = 3) -> torch.Tensor:
    return torch.randn(4, channels, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(tmp_path):
    """A file of a backbone's weights, with statistics of its own."""
    network = ResNet(BACKBONE, seed=5)
    for _ in range(3):
        network(pictures() * 2 + 1)
    save_file(network.state_dict(), tmp_path / "backbone.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "backbone.pt")
    return tmp_path, network.eval()


def test_a_section_says_its_family_or_is_the_small_one() -> None:
    read = TypeAdapter(LearnerModelConfig).validate_python
    assert read({"num_classes": 3}) == ClassifierConfig(num_classes=3)
    assert type(build_classifier(read({}))) is Classifier
    for family, fields in (("vit", {"preset": "s"}), ("resnet", {"depth": 18})):
        config = read({"family": family, "num_classes": 3} | fields)
        assert type(config) is FAMILIES[family][0]
        with torch.device("meta"):
            assert type(build_classifier(config)) is FAMILIES[family][1]
    with pytest.raises(ValidationError, match="'small', 'vit', 'resnet', 'probe', 'imported'"):
        read({"family": "alexnet"})
    with pytest.raises(ValidationError, match="preset"):
        read({"preset": "s"})  # a field of another family
    assert torch.equal(
        build_classifier(ClassifierConfig(), seed=4).head.weight,
        Classifier(ClassifierConfig(), seed=4).head.weight,
    )


def test_folders_written_before_families_are_read(tmp_path) -> None:
    import json

    model = Classifier(ClassifierConfig(channels=(8,), groups=4), seed=1)
    save_classifier(tmp_path, model, 16, list("0123456789"))
    about = json.loads((tmp_path / "classifier.json").read_text())
    assert about["model"].pop("family") == "small"
    (tmp_path / "classifier.json").write_text(json.dumps(about))
    found = Extractor("classifier", tmp_path).backbone.model
    assert torch.equal(found.head.weight, model.head.weight)


@pytest.mark.parametrize("file", ["backbone.safetensors", "backbone.pt"])
def test_a_probe_is_a_linear_map_of_frozen_features(weights, file: str) -> None:
    folder, network = weights
    config = ProbeConfig(weights=str(folder / file), backbone=BACKBONE, num_classes=6)
    probe, x = Probe(config, seed=2), pictures()
    expected = network.features(x)
    for mode in (True, False):  # statistics neither used nor changed in training
        probe.train(mode)
        torch.testing.assert_close(probe.features(x), expected)
    logits = expected @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe(x), logits)
    assert [n for n, p in probe.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    x.requires_grad_()  # guidance asks for the picture's gradient
    assert torch.autograd.grad(probe(x).square().sum(), x)[0].abs().sum() > 0
    assert not torch.equal(Probe(config, seed=3).head.weight, probe.head.weight)


def test_a_probe_stands_on_a_judges_folder(tmp_path) -> None:
    model = Classifier(ClassifierConfig(channels=(8, 16), groups=4), seed=1).eval()
    save_classifier(tmp_path / "run" / "judge", model, 16, list("0123456789"))
    for place in (tmp_path / "run", tmp_path / "run" / "judge"):
        probe = Probe(ProbeConfig(weights=str(place), in_channels=1, num_classes=2))
        torch.testing.assert_close(probe.features(pictures(1)), model.features(pictures(1)))
    with pytest.raises(UserError, match="sees 1 channels: set in_channels=1"):
        Probe(ProbeConfig(weights=str(tmp_path / "run")))
    config = ProbeConfig(weights=str(tmp_path / "run"), backbone=BACKBONE)
    with pytest.raises(UserError, match="backbone has no effect"):
        Probe(config)


def test_wrong_weights_of_a_probe_are_refused(weights) -> None:
    folder, _ = weights
    file = folder / "backbone.safetensors"
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    Probe(ProbeConfig(weights=str(file), backbone=BACKBONE, sha256=right))
    (folder / "broken.safetensors").write_bytes(file.read_bytes()[:100])
    torch.save({"model": nn.Linear(2, 2)}, folder / "pickled.pt")
    wide = ResNetConfig(width=16, num_classes=4, stem="small")
    for name, fields, message in (
        (file.name, {"sha256": "0" * 64}, f"has sha256 {right}, not 000"),
        (file.name, {"backbone": None}, "does not say which network"),
        (file.name, {"backbone": wide}, "does not hold the backbone: .* size mismatch"),
        ("absent.pt", {}, "there are no weights at"),
        ("broken.safetensors", {}, "cannot be read"),
        ("pickled.pt", {}, "is not a plain file of weights"),
    ):
        with pytest.raises(UserError, match=message):
            Probe(ProbeConfig(**{"weights": str(folder / name), "backbone": BACKBONE} | fields))
    with pytest.raises(ValidationError, match="make them equal"):
        ProbeConfig(weights="x", backbone=BACKBONE, in_channels=1)


def test_a_network_of_the_users_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "def plain(in_channels, num_classes, seed):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes)\n"
        "        if seed < 0 else torch.nn.Linear(in_channels * 4, num_classes))\n"
        "def nothing(in_channels, num_classes, seed):\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = ImportedConfig(target="my_networks:plain", in_channels=2, num_classes=3)
    before = torch.get_rng_state()
    one, two, other = (build_classifier(config, seed=seed)[1].weight for seed in (0, 0, 1))
    assert one.shape == (3, 8)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
    for target, message in (
        ("my_networks:nothing", "returned a int: it must return a torch.nn.Module"),
        ("my_networks:absent", "cannot be imported .* no attribute 'absent'"),
        ("no_such_module:f", "cannot be imported"),
    ):
        with pytest.raises(UserError, match=message):
            build_classifier(ImportedConfig(target=target))
    with pytest.raises(ValidationError, match="must be package.module:function"):
        ImportedConfig(target="my_networks.plain")
    sys.modules.pop("my_networks")
