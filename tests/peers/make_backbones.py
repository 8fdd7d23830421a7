"""Writes backbones.npz: what torchvision 0.28.0 and timm 1.0.31 make of stated weights, pictures.

    python tests/peers/make_backbones.py

needs both beside torch 2.13. `test_backbones.py` compares with the file and needs neither; weights
and pictures, from which both sides start, are drawn here, by name.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).parent / "backbones.npz"
CLASSES = 7
SIDES = {"inception_torchvision": 299, "dinov2": 56}  # of the network's input; 224 elsewhere
# Picture (height, width), shorter side, crop and filter of a preprocessing.
PREPARED = {
    "wide": (301, 417, 256, 224, "bilinear"),
    "tall": (403, 260, 236, 224, "bilinear"),
    "inception": (280, 281, 342, 299, "bilinear"),
    "clip": (301, 230, 224, 224, "bicubic"),
    "odd": (91, 120, 37, 32, "bicubic"),
}


def drawn(name: str, count: int) -> np.ndarray:
    """Numbers about standard normal, (count,) float32: a block that follows from the name, again
    and again, since a whole network of normals takes longer than running it.
    """
    block = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(8_191)
    return np.resize(block.astype(np.float32), count)


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight, away from zero and one, by its name and shape; a large matrix is a view of few
    numbers, w[i, j] = s[i + j], so that its file is small.
    """
    if len(shape) == 2 and math.prod(shape) > 1 << 23:
        line = torch.from_numpy(drawn(name, sum(shape) - 1)) * (2.0 / shape[1]) ** 0.5
        return line.as_strided(shape, (1, 1))
    value = torch.from_numpy(drawn(name, math.prod(shape))).reshape(shape)
    if name.endswith("running_var"):
        return 1.0 + 0.3 * value.abs()
    if name.endswith(("pos_embed", "cls_token", "layer_scale", "gamma")):
        return 0.5 * value
    if len(shape) > 1:
        return value * (2.0 / math.prod(shape[1:])) ** 0.5
    return 0.2 * value + (1.0 if name.endswith("weight") else 0.0)


def state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict of these names and shapes; counts of batches, which have none, are left out."""
    return {name: tensor(name, tuple(shape)) for name, shape in shapes.items()}


def input_of(name: str) -> Tensor:
    """What a network sees, (1, 3, S, S) float32."""
    side = SIDES.get(name, 224)
    return torch.from_numpy(drawn(f"{name} input", 3 * side * side)).reshape(1, 3, side, side)


def picture(height: int, width: int) -> np.ndarray:
    """A picture (height, width, 3) uint8 of noise over a slope."""
    rows, columns = np.mgrid[:height, :width]
    noise = drawn("picture", height * width * 3).reshape(height, width, 3)
    levels = rows[..., None] * 0.4 + columns[..., None] * [0.1, 0.3, 0.2] + 40.0 * noise
    return levels.clip(0, 255).astype(np.uint8)


def import_peers() -> None:
    """torchvision's Python, where its compiled operators do not fit this torch."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import_peers.kept = library


def networks() -> Iterator[tuple[str, nn.Module, str]]:
    """Name, network, and the module whose input is its features."""
    import timm
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    yield (
        "inception_torchvision",
        models.inception_v3(num_classes=CLASSES, init_weights=False),
        "fc",
    )
    yield "resnet50", models.resnet50(num_classes=CLASSES), "fc"
    keras = models.resnet50(num_classes=CLASSES)
    for module in keras.modules():
        if isinstance(module, models.resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    yield "keras", keras, "fc"
    yield "mobilenet", models.mobilenet_v2(num_classes=CLASSES), "classifier.1"
    yield "vgg16", models.vgg16(num_classes=CLASSES), "classifier.6"
    stages = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 2), CNBlockConfig(64, 128, 3)]
    stages.append(CNBlockConfig(128, None, 1))
    yield "convnext", ConvNeXt(stages, num_classes=CLASSES), "classifier.2"
    small = {"img_size": 56, "patch_size": 14, "embed_dim": 64, "depth": 3, "num_heads": 1}
    vit = timm.models.vision_transformer.VisionTransformer(
        **small, init_values=1.0, num_classes=CLASSES, global_pool="token"
    )
    yield "dinov2", vit, "head"


def measured() -> Iterator[tuple[str, np.ndarray]]:
    """Names and shapes of each network's weights, its features and its logits, in float64."""
    for name, network, head in networks():
        shapes = {n: list(v.shape) for n, v in network.state_dict().items() if v.ndim}
        yield f"{name} shapes", np.array(json.dumps(shapes))
        network.load_state_dict(state(shapes), strict=False)
        seen = []
        module = network.get_submodule(head)
        module.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            logits = network.double().eval()(input_of(name).double())
        yield f"{name} logits", logits[0].numpy()
        yield f"{name} features", seen[0][0].numpy().astype(np.float32)


def prepared() -> Iterator[tuple[str, np.ndarray]]:
    """A checksum and some of the bytes that torchvision's transforms leave of a picture."""
    import PIL
    from PIL import Image
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    print(f"Pillow {PIL.__version__}")
    for name, (height, width, shorter, size, filter) in PREPARED.items():
        image = Image.fromarray(picture(height, width))
        image = Resize(shorter, InterpolationMode(filter))(image)
        levels = np.asarray(CenterCrop(size)(image))
        yield f"{name} sum", np.array(zlib.crc32(levels.tobytes()), dtype=np.uint32)
        yield f"{name} some", levels[::16, ::16]


def main() -> None:
    import_peers()
    found = dict(measured()) | dict(prepared())
    np.savez_compressed(FILE, **found)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {len(found)} arrays")


if __name__ == "__main__":
    main()
