"""Backbones against transformers, Pillow, formulas, and the code that wrote their weights."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from etude.core.errors import UserError
from etude.metrics.extractors import Extractor
from etude.metrics.extractors.clip import LEVELS
from etude.metrics.extractors.preparing import IMAGENET
from etude.metrics.extractors.vision_transformer import resampled_positions
from etude.models.resnet import ResNet, ResNetConfig
from etude.unpacking import keras_resnet50, tfjs_arrays

TEXTS = ["a red cat", "the moon", "a picture of the blue house one two sun star tree face"]


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Noise over a slope, (count, height, width, 3) uint8."""
    noise = np.random.default_rng(height).normal(0, 40, (count, height, width, 3))
    return (np.arange(width)[:, None] * [0.5, 0.3, 0.2] + 60 + noise).clip(0, 255).astype(np.uint8)


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight away from zero and one, so that none of them can be left out unseen."""
    numbers = np.random.default_rng(seed)
    for parameter in model.parameters():
        shape = tuple(parameter.shape)
        values = torch.from_numpy(numbers.standard_normal(shape, dtype=np.float32))
        matrix = parameter.ndim > 1
        scale = (1.0 / parameter[0].numel()) ** 0.5 if matrix else 0.3
        parameter.data = values * scale + (0.0 if matrix else 0.7)
    return model.eval().requires_grad_(False)


def clip_model(tmp_path: Path, activation: str = "quick_gelu") -> nn.Module:
    """A tiny CLIP of transformers, written to a folder."""
    import transformers

    text = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 24}
    text |= {"max_position_embeddings": 12, "eos_token_id": 2, "projection_dim": 24}
    vision = {"hidden_size": 64, "num_attention_heads": 1, "image_size": 32, "patch_size": 8}
    more = {"num_hidden_layers": 3, "intermediate_size": 96, "hidden_act": activation}
    sections = {"text_config": text | more, "vision_config": vision | more}
    config = transformers.CLIPConfig(**sections, projection_dim=24)
    model = redrawn(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    return model


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clips_picture_features_are_transformers(tmp_path, activation) -> None:
    model = clip_model(tmp_path, activation)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 3, 32, 32)))
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        backbone = Extractor("clip", tmp_path).backbone.to(dtype)
        found = backbone(x.to(dtype), tuple(backbone.taps))
        pooled = model.to(dtype).vision_model(x.to(dtype)).pooler_output
        close(found["pooled"], pooled, bound)
        close(found["projection"], model.visual_projection(pooled), bound)


def test_clip_in_its_publishers_layout_gives_the_same_features(tmp_path) -> None:
    clip_model(tmp_path / "folder")
    there = load_file(tmp_path / "folder" / "model.safetensors")
    found = {"logit_scale": there["logit_scale"], "positional_embedding": torch.zeros(12, 32)}
    found["visual.proj"] = there["visual_projection.weight"].T.contiguous()
    for ours, theirs in (
        ("class_embedding", "embeddings.class_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("conv1.weight", "embeddings.patch_embedding.weight"),
        *((f"ln_pre.{p}", f"pre_layrnorm.{p}") for p in ("weight", "bias")),
        *((f"ln_post.{p}", f"post_layernorm.{p}") for p in ("weight", "bias")),
    ):
        found[f"visual.{ours}"] = there[f"vision_model.{theirs}"]
    for number in range(3):
        block, old = (
            f"visual.transformer.resblocks.{number}.",
            f"vision_model.encoder.layers.{number}.",
        )
        for part in ("weight", "bias"):
            three = [there[f"{old}self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            found[f"{block}attn.in_proj_{part}"] = torch.cat(three)
            found[f"{block}attn.out_proj.{part}"] = there[f"{old}self_attn.out_proj.{part}"]
            found[f"{block}ln_1.{part}"] = there[f"{old}layer_norm1.{part}"]
            found[f"{block}ln_2.{part}"] = there[f"{old}layer_norm2.{part}"]
            found[f"{block}mlp.c_fc.{part}"] = there[f"{old}mlp.fc1.{part}"]
            found[f"{block}mlp.c_proj.{part}"] = there[f"{old}mlp.fc2.{part}"]
    torch.save(found, tmp_path / "clip.pt")
    folder = Extractor("clip", tmp_path / "folder")
    with pytest.raises(UserError, match="does not say its activation; set activation=quick_gelu"):
        Extractor("clip", tmp_path / "clip.pt")
    file = Extractor("clip", tmp_path / "clip.pt", activation="quick_gelu")
    x = pictures(2, 40, 50)
    assert torch.equal(folder(x), file(x)) and folder.weights_sha256 == file.weights_sha256
    gelu = Extractor("clip", tmp_path / "clip.pt", activation="gelu")
    assert not torch.allclose(gelu(x), file(x), rtol=1e-3) and gelu.version != file.version
    with pytest.raises(UserError, match="without a tokenizer"):
        file.backbone.text(["a"])
    with pytest.raises(UserError, match="leave out activation"):
        Extractor("clip", tmp_path / "folder", activation="gelu")


def test_clips_text_features_are_transformers(tmp_path, text_models) -> None:
    model = clip_model(tmp_path)
    shutil.copy(text_models / "clip_l" / "tokenizer.json", tmp_path)
    shutil.copy(text_models / "clip_l" / "tokenizer_config.json", tmp_path)
    found = Extractor("clip", tmp_path).backbone.text(TEXTS)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    for row, text in enumerate(TEXTS):
        words = [vocabulary[word] for word in text.split()][:10]
        ids = torch.tensor([[vocabulary["<s>"], *words, vocabulary["</s>"]]])
        hidden = model.text_model(input_ids=ids).last_hidden_state[:, -1]
        close(found[row], model.text_projection(hidden)[0])


def test_pictures_reach_clip_as_pillow_prepares_them(tmp_path) -> None:
    clip_model(tmp_path)
    image = pictures(1, 61, 90)[0]
    mean, std = np.array(LEVELS.mean), np.array(LEVELS.std)
    whole = Image.fromarray(image)
    shorter = np.asarray(whole.resize((int(32 * 90 / 61), 32), Image.Resampling.BICUBIC))
    left = round((shorter.shape[1] - 32) / 2)
    square = whole.crop((14, 0, 75, 61)).resize((32, 32), Image.Resampling.BICUBIC)
    for preset, levels in (("clip", shorter[:, left : left + 32]), ("cmmd", np.asarray(square))):
        extractor = Extractor("clip", tmp_path, preset=preset)
        found = extractor.backbone.prepare(torch.from_numpy(image)[None], torch.float32)
        expected = ((levels / 255 - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=1e-5)
        assert ("largest" in extractor.resize) == (preset == "cmmd")  # the store tells them apart


def dinov2_model(folder: Path, registers: int, swiglu: bool) -> nn.Module:
    """A tiny DINOv2 of transformers, trained for 56 pixels, written to a folder."""
    import transformers as tf

    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"image_size": 56, "patch_size": 14, "use_swiglu_ffn": swiglu}
    if registers:
        config = tf.Dinov2WithRegistersConfig(num_register_tokens=registers, **shape)
        model = tf.Dinov2WithRegistersModel(config)
    else:
        model = tf.Dinov2Model(tf.Dinov2Config(**shape))
    redrawn(model).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "registers, swiglu, size", [(0, False, 56), (0, True, 56), (3, False, 56), (3, False, 84)]
)
def test_dinov2_is_transformers(tmp_path, registers, swiglu, size) -> None:
    """With registers also on another grid; without, transformers resamples another way."""
    model = dinov2_model(tmp_path, registers, swiglu)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 3, size, size)))
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-6 if size != 56 else 1e-12)):
        backbone = Extractor("dinov2", tmp_path, input_size=size).backbone.to(dtype)
        found = backbone(x.to(dtype), tuple(backbone.taps))
        tokens = model.to(dtype)(x.to(dtype)).last_hidden_state
        close(found["cls"], tokens[:, 0], bound)
        close(found["patches"], tokens[:, 1 + registers :].mean(1), bound)


def test_positions_without_registers_are_resampled_as_they_were_published() -> None:
    """Bicubic with a = -3/4 at (i + 1/2) 4 / 2.1 - 1/2, written out; the class token's stays."""
    positions = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 17, 2)))
    found = resampled_positions(positions, 2, antialias=False, offset=0.1)

    def cubic(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = np.zeros((2, 4))
    for i in range(2):
        centre = (i + 0.5) * 4 / 2.1 - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(j, 0), 3)] += cubic(centre - j)
    square = positions[0, 1:].reshape(4, 4, 2).numpy()
    expected = np.einsum("ia,jb,abc->ijc", matrix, matrix, square).reshape(4, 2)
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-12)
    assert torch.equal(found[:, 0], positions[:, 0])


def test_dinov2_sees_the_whole_picture_by_pillows_bicubic_filter(tmp_path) -> None:
    dinov2_model(tmp_path, 0, False)
    backbone = Extractor("dinov2", tmp_path, input_size=56).backbone
    image = pictures(1, 70, 91)[0]
    levels = np.asarray(Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC))
    expected = (levels / 255 - np.array(IMAGENET.mean)) / np.array(IMAGENET.std)
    found = backbone.prepare(torch.from_numpy(image)[None], torch.float32)[0].permute(1, 2, 0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_swavs_file_is_the_same_network_at_other_levels(tmp_path) -> None:
    model = redrawn(ResNet(ResNetConfig(depth=50, num_classes=2)), seed=4)
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("fc.")}
    torch.save(state, tmp_path / "plain.pth")
    heads = {"projection_head.0.weight": torch.zeros(2, 2), "prototypes.weight": torch.zeros(3, 2)}
    torch.save({f"module.{n}": v for n, v in (state | heads).items()}, tmp_path / "swav.pth.tar")
    plain, swav = (Extractor("resnet50", tmp_path / n) for n in ("plain.pth", "swav.pth.tar"))
    assert list(swav.backbone.taps) == ["pool"] and plain.weights_sha256 == swav.weights_sha256
    assert swav.resize != plain.resize  # or the store would take one for the other
    x = torch.from_numpy(pictures(1, 256, 300))
    one, two = (e.backbone.prepare(x, torch.float32) for e in (plain, swav))
    torch.testing.assert_close(one[:, 0] * 0.229, two[:, 0] * 0.228, rtol=0, atol=1e-6)
    assert torch.equal(one[:, 1:], two[:, 1:])
    with torch.no_grad():
        close(swav.backbone(two, ("pool",))["pool"], model.features(two), 2e-5)
    with pytest.raises(UserError, match="leave out variant"):
        Extractor("resnet50", tmp_path / "swav.pth.tar", variant="keras")


class Arrays(dict):
    """Small arrays for every name of Keras's ResNet-50."""

    def __missing__(self, name: str) -> np.ndarray:
        shape = {"kernel": (3, 3, 3, 5)}.get(name.split("/")[1], (5,))
        if name == "fc1000/kernel":
            shape = (4, 5)
        return self.setdefault(name, np.random.default_rng(len(self)).random(shape) + 0.5)


def test_keras_weights_are_turned_into_the_same_sums() -> None:
    """Convolution of blue, green, red with a bias, then normalisation, against what was mapped."""
    there = Arrays()
    ours = dict(keras_resnet50(there))
    shapes = ResNet(ResNetConfig(depth=50)).state_dict()
    assert ours.keys() == {n for n in shapes if not n.endswith("num_batches_tracked")}
    assert torch.equal(ours["fc.weight"], torch.from_numpy(there["fc1000/kernel"].T.copy()))
    x = torch.from_numpy(np.random.default_rng(0).random((1, 3, 5, 5)))
    for conv, norm, seen, names in (
        ("conv1", "bn_conv1", x.flip(1), ("conv1", "bn1")),
        ("res3a_branch2b", "bn3a_branch2b", x, ("layer2.0.conv2", "layer2.0.bn2")),
        ("res5a_branch1", "bn5a_branch1", x, ("layer4.0.downsample.0", "layer4.0.downsample.1")),
    ):
        kernel = torch.from_numpy(there[f"{conv}/kernel"]).permute(3, 2, 0, 1)
        y = F.conv2d(seen, kernel, torch.from_numpy(there[f"{conv}/bias"]))
        order = ("moving_mean", "moving_variance", "gamma", "beta")
        mean, variance, gamma, beta = (
            torch.from_numpy(there[f"{norm}/{n}"])[:, None, None] for n in order
        )
        expected = (y - mean) / (variance + 1e-3).sqrt() * gamma + beta
        mapped = [ours[f"{names[1]}.{n}"] for n in ("running_mean", "running_var")]
        mapped += [ours[f"{names[1]}.{n}"] for n in ("weight", "bias")]
        found = F.batch_norm(F.conv2d(x, ours[f"{names[0]}.weight"]), *mapped, eps=1e-3)
        torch.testing.assert_close(found, expected)


def test_arrays_of_tensorflow_js_follow_one_another_over_their_files() -> None:
    data = np.arange(10, dtype="<f4").tobytes()
    weights = [
        {"name": "a", "shape": [2, 3], "dtype": "float32"},
        {"name": "b", "shape": [4], "dtype": "float32"},
    ]
    model = {"weightsManifest": [{"paths": ["one.bin", "two.bin"], "weights": weights}]}
    files = {"one.bin": data[:13], "two.bin": data[13:]}
    found = tfjs_arrays(model, files)
    np.testing.assert_array_equal(found["a"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(found["b"], np.arange(6, 10))
    with pytest.raises(UserError, match="do not fill"):
        tfjs_arrays(model, files | {"two.bin": data[13:] + b"\0"})


def test_vgg16s_convolutions_are_those_of_lpips(tmp_path) -> None:
    from etude.models.lpips import LPIPS

    lpips = redrawn(LPIPS("vgg16"), seed=5)
    state = {n: v.contiguous() for n, v in lpips.to_file().items()}
    save_file(state, tmp_path / "vgg16.safetensors")
    save_file(state, tmp_path / "alexnet.safetensors")  # beside it, as it is fetched
    extractor = Extractor("vgg16", tmp_path)
    assert dict(extractor.backbone.taps) == {"relu5_3": 512}
    x = torch.from_numpy(pictures(1, 256, 256))
    seen = x[:, 16:240, 16:240].permute(0, 3, 1, 2).float() / 127.5 - 1
    h = (seen - lpips.shift) / lpips.scale
    for number, conv in enumerate(lpips.convs):
        h = F.max_pool2d(h, 2) if number in (2, 4, 7, 10) else h
        h = conv(h).relu()
    close(extractor(x), h.mean((2, 3)), 2e-5)
    tf1 = Extractor("vgg16", tmp_path, preset="tf1").backbone.prepare(x, torch.float32)
    at = np.arange(224, dtype=np.float32) * np.float32(256 / 224)
    low = np.floor(at).astype(int)
    share = (at - low)[:, None]
    line = x[0, 0, :, 0].numpy().astype(float)
    expected = line[low] + (line[np.minimum(low + 1, 255)] - line[low]) * share[:, 0]
    np.testing.assert_allclose(tf1[0, 0, 0], (expected / 255 - 0.485) / 0.229, atol=1e-5)


@pytest.mark.parametrize("kind", ["mobilenet", "resnet50", "convnext", "dinov2", "clip", "vgg16"])
def test_files_of_something_else_are_refused_in_one_sentence(tmp_path, kind) -> None:
    with pytest.raises(UserError, match="there are no .* weights"):
        Extractor(kind, tmp_path / "absent")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as fault:
        Extractor(kind, tmp_path / "other.safetensors")
    assert str(tmp_path) in str(fault.value) and "\n" not in str(fault.value)
    torch.save({"conv.weight": Path("code")}, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="plain file of weights"):
        Extractor(kind, tmp_path / "pickle.pt")


@pytest.mark.fetched("mobilenet", "resnet50", "photos")
@pytest.mark.parametrize("kind", ["mobilenet", "resnet50"])
def test_real_weights_know_a_pizza(kind) -> None:
    """ImageNet's class 963 is pizza; steak and sushi are none of its classes."""
    data = Path(os.environ.get("ETUDE_DATA", "data"))
    extractor = Extractor(kind, data / kind, taps=("logits",))
    called = {}
    for name in ("pizza", "sushi"):
        files = sorted((data / "photos" / name).glob("*.jpg"))[:8]
        images = [torch.tensor(np.asarray(Image.open(file).convert("RGB"))) for file in files]
        called[name] = [int(extractor(image[None]).argmax()) for image in images].count(963)
    assert called["pizza"] >= 6 and called["sushi"] <= 1
