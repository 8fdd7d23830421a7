"""Inception: layouts of weights, folding, precision, batches, resizing, and what is refused."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from etude.core.errors import UserError
from etude.metrics.extractors import Extractor
from etude.metrics.extractors.inception import resize_clean
from etude.metrics.extractors.inception_network import Convolution, Inception
from etude.metrics.extractors.inception_weights import torchvision_names
from etude.metrics.inception_score import score_name

INCEPTION = Path(os.environ.get("ETUDE_INCEPTION", "data/inception"))
TAPS = ("2048", "64", "192", "768", "logits", "logits_unbiased", "spatial")
_LENGTHS = {"logits": 1008, "logits_unbiased": 1008, "spatial": 17 * 17 * 7}
_NORM = {"beta": "bias", "mean": "running_mean", "var": "running_var"}


def pictures(rows: int, side: int, channels: int) -> Tensor:
    """Noise (rows, side, side, channels) uint8, of less and less contrast."""
    noise = np.random.default_rng(0).integers(0, 256, (rows, side, side, channels))
    return torch.from_numpy((noise // np.arange(1, rows + 1)[:, None, None, None]).astype(np.uint8))


IMAGES = pictures(2, 80, 3)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under the graph's names, away from zero, the classifier's among them."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, old in Inception(classes=1008).state_dict().items():
        value = torch.randn(old.shape, generator=generator)
        if old.dim() > 1:
            value *= (2.0 / old[0].numel()) ** 0.5
        made[name] = 1.0 + 0.3 * value.abs() if name.endswith("var") else value
        if name.endswith(("beta", "mean")):
            made[name] *= 0.2
    return made


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "ours.safetensors"
    save_file(state, path)
    return path


def opened(path: Path, **options) -> Extractor:
    return Extractor("inception", path, **({"taps": TAPS, "check": False} | options))


@pytest.fixture(scope="module")
def plain(weights) -> Extractor:
    """The network as published, not folded."""
    return opened(weights, fold=False)


@pytest.fixture(scope="module")
def fast(weights) -> Extractor:
    return opened(weights)


@pytest.fixture(scope="module")
def exact(plain) -> dict[str, Tensor]:
    """Features of IMAGES by the network as published, in float64."""
    network = copy.deepcopy(plain.backbone.network).double()
    with torch.no_grad():
        return network(plain.backbone.prepare(IMAGES, torch.float32).double(), TAPS)


def far(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest number."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def in_torchvisions_names(state: dict[str, Tensor], path: Path) -> None:
    made = {"fc.weight": state["output.weight"], "fc.bias": state["output.bias"]}
    for theirs, ours in torchvision_names().items():
        made[f"{theirs}.conv.weight"] = state[f"{ours}.weight"]
        made[f"{theirs}.bn.weight"] = torch.ones(len(state[f"{ours}.beta"]))
        made[f"{theirs}.bn.num_batches_tracked"] = torch.tensor(0)
        made |= {f"{theirs}.bn.{n}": state[f"{ours}.{o}"] for o, n in _NORM.items()}
    torch.save(made, path)


class Part(nn.Module):
    """A node of NVIDIA's archive: tensors and further nodes."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def as_torchscript(state: dict[str, Tensor], path: Path) -> None:
    root = Part()
    for name, value in state.items():
        *places, last = (name if name.startswith("output") else f"layers.{name}").split(".")
        node = root
        for place in places:
            if not hasattr(node, place):
                node.add_module(place, Part())
            node = getattr(node, place)
        node.register_buffer(last, value)
    torch.jit.script(root).save(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("write", [in_torchvisions_names, as_torchscript])
def test_every_layout_of_equal_weights_is_one_extractor(write, state, fast, tmp_path) -> None:
    write(state, tmp_path / "theirs.pt")
    theirs = opened(tmp_path / "theirs.pt")
    assert theirs.weights_sha256 == fast.weights_sha256
    found, expected = theirs.features(IMAGES[:1]), fast.features(IMAGES[:1])
    assert found.keys() == expected.keys() and len(found) == len(TAPS)
    for name, features in expected.items():
        assert torch.equal(found[name], features), name


def test_a_batch_normalisations_scale_goes_into_the_weights(state, fast, tmp_path) -> None:
    """y = s (w x - mean) / std + beta, of which the graph's s is 1."""
    in_torchvisions_names(state, tmp_path / "theirs.pth")
    made = torch.load(tmp_path / "theirs.pth")
    for name, value in made.items():
        if name.endswith("bn.weight"):
            made[name] = value * 2.0
            made[name.replace("bn.weight", "conv.weight")] /= 2.0
            made[name.replace("bn.weight", "bn.running_mean")] /= 2.0
    torch.save(made, tmp_path / "theirs.pth")
    assert opened(tmp_path / "theirs.pth").weights_sha256 == fast.weights_sha256


def test_folded_features_are_the_published_networks(fast, exact) -> None:
    found = fast.features(IMAGES)
    assert found["inception"].dtype == torch.float32
    for tap, features in zip(TAPS, found.values(), strict=True):
        assert features.shape == exact[tap].shape == (2, _LENGTHS.get(tap) or int(tap))
        assert far(features, exact[tap]) < 1e-5, tap


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_without_onednn_the_numbers_are_the_same(fast, exact) -> None:
    network = copy.deepcopy(fast.backbone.network)  # without what oneDNN has laid out
    x = fast.backbone.prepare(IMAGES, torch.float32)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert far(network(x)["2048"], exact["2048"]) < 1e-5
    assert network.conv._packed is None
    if torch.backends.mkldnn.is_available():
        with torch.no_grad():
            assert far(network(x)["2048"], exact["2048"]) < 1e-5
        assert network.conv._packed is not None


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 4e-2), ("float16", 5e-3)])
def test_half_precision_stays_near_and_keeps_float32_logits(weights, exact, dtype, bound) -> None:
    half = opened(weights, dtype=dtype)
    found = half.features(IMAGES)
    error = (found["inception"] - exact["2048"]).norm() / exact["2048"].norm()
    assert bound / 200 < error < bound
    output = half.backbone.network.output.double()
    unbiased = found["inception"].double() @ output.weight.T
    assert far(found["inception/logits_unbiased"], unbiased) < 1e-5
    assert far(found["inception/logits"], unbiased + output.bias) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_picture_has_the_same_features_in_any_batch(weights, fast, dtype) -> None:
    """The bound is on differences of rounding; where a batch's size changes nothing they are 0."""
    extractor = fast if dtype == "float32" else opened(weights, dtype=dtype)
    x, bound = pictures(3, 64, 3), {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    together = extractor(x)
    alone = torch.cat([extractor(x[i : i + 1]) for i in range(3)])
    assert far(alone, together.double()) < bound
    assert far(together[:1], together[2:].double()) > 2 * bound  # different pictures differ


def test_taps_are_the_places_that_they_name(plain) -> None:
    network, seen, hooks = plain.backbone.network, {}, []

    def note(name: str, of_input: bool) -> Callable:
        return lambda _, given, out: seen.update({name: given[0] if of_input else out})

    for name in ("conv_3", "mixed", "mixed_6.conv", "mixed_7", "mixed_10"):
        hook = note(name, of_input=name in ("conv_3", "mixed"))
        hooks.append(network.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        found = network(plain.backbone.prepare(IMAGES[:1], torch.float32), TAPS)
    for hook in hooks:
        hook.remove()
    places = {"64": "conv_3", "192": "mixed", "768": "mixed_7", "2048": "mixed_10"}
    for tap, place in places.items():
        torch.testing.assert_close(found[tap][0], seen[place][0].mean((1, 2)))
    spatial = found["spatial"].reshape(17, 17, 7)
    assert (spatial > 0).float().mean() > 0.1
    for channel in range(7):
        assert torch.equal(spatial[..., channel], seen["mixed_6.conv"][0, channel])


@pytest.mark.parametrize("tap", TAPS)
def test_a_tap_alone_is_the_same_and_needs_no_later_layer(fast, tap) -> None:
    x, network = fast.backbone.prepare(IMAGES[:1], torch.float32), fast.backbone.network
    calls: list[int] = []
    hook = network.mixed_10.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        alone = network(x, (tap,))
    hook.remove()
    name = "inception" if tap == "2048" else f"inception/{tap}"
    assert list(alone) == [tap] and torch.equal(alone[tap], fast.features(IMAGES[:1])[name])
    assert bool(calls) == (tap in ("2048", "logits", "logits_unbiased"))


def test_a_grey_picture_is_three_equal_colours(fast) -> None:
    grey = pictures(1, 64, 1)
    assert torch.equal(fast(grey), fast(grey.repeat(1, 1, 1, 3)))


@pytest.mark.parametrize(("height", "width"), [(41, 37), (299, 256), (700, 433)])
def test_clean_resizing_is_pillows_of_floats(height, width) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (height, width)).astype(np.float32)
    pillow = Image.fromarray(x, mode="F").resize((299, 299), Image.Resampling.BICUBIC)
    found = resize_clean(torch.from_numpy(x)[None, None], 299)[0, 0]
    np.testing.assert_allclose(found, np.asarray(pillow).clip(0, 255), atol=2e-4)
    if height == 41:  # cutting off is tested
        assert np.asarray(pillow).max() > 256 and np.asarray(pillow).min() < -1


def test_conventions_of_resizing_are_part_of_what_the_store_knows(weights, fast, plain) -> None:
    others = [opened(weights, resize=rule).resize for rule in ("clean", "pytorch")]
    assert len({fast.resize, *others}) == 3
    assert plain.version != fast.version


def test_a_convolution_alone_folds_as_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(3)
    layer = Convolution(4, 6, (1, 3)).double()
    for tensor in [layer.weight.data, layer.beta, layer.mean, layer.var]:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    x = torch.randn(2, 4, 5, 7, generator=generator).double()
    convolved = nn.functional.conv2d(x, layer.weight, padding=(0, 1))
    beta, mean, var = (v[:, None, None] for v in (layer.beta, layer.mean, layer.var))
    expected = ((convolved - mean) / (var + 0.001).sqrt() + beta).relu()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        layer.fold()
        torch.testing.assert_close(layer(x), expected)


def test_wrong_files_are_one_sentence(state, weights, tmp_path) -> None:
    with pytest.raises(UserError, match="etude data fetch inception"):
        Extractor("inception", tmp_path / "no.pt")
    (tmp_path / "odd.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="odd.pt"):
        Extractor("inception", tmp_path / "odd.pt")
    with pytest.raises(UserError, match="other weights than those of inception-2015-12-05"):
        Extractor("inception", weights)
    with pytest.raises(UserError, match="no resize 'bicubic'"):
        opened(weights, resize="bicubic")
    less = {n: v for n, v in state.items() if n != "mixed_4.tower.conv_1.beta"}
    save_file(less, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="mixed_4.tower.conv_1.beta"):
        opened(tmp_path / "less.safetensors")
    trunk = {n: v for n, v in state.items() if not n.startswith("output")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    assert opened(tmp_path / "trunk.safetensors", taps=("768",)).dim == 768
    with pytest.raises(UserError, match="no classifier"):
        opened(tmp_path / "trunk.safetensors", taps=("2048", "logits"))


@pytest.mark.fetched
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not INCEPTION.exists(), reason="type: etude data fetch inception")
def test_our_inception_is_the_archives_own_network(tmp_path) -> None:
    archive = torch.jit.load(INCEPTION / "default_1.pt", map_location="cpu")
    extractor = Extractor("inception", INCEPTION / "default_1.pt")
    x = pictures(2, 299, 3)
    with torch.no_grad():
        expected = archive((x.permute(0, 3, 1, 2).float() - 128) / 128)
    torch.testing.assert_close(extractor(x), expected, rtol=1e-4, atol=1e-4)

    again = Extractor("inception", INCEPTION)
    assert again.weights_sha256 == extractor.weights_sha256
    assert torch.equal(again(x), extractor(x))

    state = load_file(INCEPTION / "inception.safetensors")
    state["conv.weight"][0, 0, 0, 0] += 1
    save_file(state, tmp_path / "inception.safetensors")
    with pytest.raises(UserError, match="other weights"):
        Extractor("inception", tmp_path)


@pytest.mark.fetched
@pytest.mark.skipif(not INCEPTION.exists(), reason="type: etude data fetch inception")
def test_a_classifier_of_somebody_elses_gives_no_published_score(state, tmp_path) -> None:
    """The tensors that FID reads are known by their hash; logits only by the whole file."""
    trunk = load_file(INCEPTION / "inception.safetensors")
    mixed = trunk | {n: value for n, value in state.items() if n.startswith("output.")}
    save_file(mixed, tmp_path / "mixed.safetensors")
    found = Extractor("inception", tmp_path / "mixed.safetensors", taps=("2048", "logits_unbiased"))
    assert found.called("inception") == "inception"
    logits = found.called("inception/logits_unbiased")
    assert score_name(logits) == "Inception score (unverified inception/logits_unbiased)"
    plain = opened(tmp_path / "mixed.safetensors", taps=("2048",))
    assert plain.called("inception") == "unverified inception"  # nobody looked
