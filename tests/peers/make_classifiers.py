"""Writes classifiers.npz: what torchvision 0.28.0 and timm 1.0.31 make of stated inputs.

    python tests/peers/make_classifiers.py

needs both beside torch 2.13. `test_classifiers.py` compares with the file and needs neither; the
numbers that both sides start from are drawn here, by name.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__).parent / "classifiers.npz"
SIGNED = 10  # operations 1 .. 9 of RandAugment's fourteen have a sign
NETWORKS = {"vit": 7, "resnet18": 5, "resnet50": 5}  # classes
SHARES = ((0.3, 2, 3), (0.9, 0, 0), (0.05, 7, 9), (0.6, 4, 9))  # share, row, column


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers (float64) that follow from the name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A value for everything in a state dict, away from zero and one, by its name and shape."""
    made = {}
    for name, old in module.state_dict().items():
        if not old.is_floating_point():
            made[name] = old
            continue
        value = drawn(name, tuple(old.shape))
        if old.ndim > 1 and not name.endswith(("pos_embed", "cls_token")):
            value = value * (2.0 / old[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            value = 1.0 + 0.3 * np.abs(value)
        else:
            value = 0.2 * value + (1.0 if name.endswith("weight") else 0.0)
        made[name] = torch.from_numpy(value)
    return made


def pictures(kind: str) -> np.ndarray:
    """Pictures (2, C, H, W) uint8: noise, and one of few levels with a channel of one level."""
    shape = {"colour": (3, 15, 18), "grey": (1, 17, 12)}[kind]
    levels = (128 + 70 * drawn(kind, (2, *shape))).clip(0, 255)
    levels[1] = levels[1] // 40 * 20 + 30
    levels[1, 0] = 77
    return levels.astype(np.uint8)


def signs(number: int) -> tuple[bool, ...]:
    """Whether an operation's magnitude is negated: both, or not for the unsigned."""
    return (False, True) if 0 < number < SIGNED else (False,)


def input_of(name: str) -> Tensor:
    return torch.from_numpy(drawn(f"{name} input", (3, 3, 32, 32)))


def measured(name: str, network: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Logits, a quarter of the picture's gradient, two numbers of every weight's; in float64."""
    network = network.double()
    network.load_state_dict(state(network))
    labels = torch.arange(3)
    for mode in ("eval", "train"):
        network.train(mode == "train")
        network.zero_grad()
        x = input_of(name).requires_grad_()
        logits = network(x)
        F.cross_entropy(logits, labels).backward()
        yield f"{name} {mode} logits", logits.detach().numpy()
        yield f"{name} {mode} picture", x.grad[..., ::2, ::2].numpy().astype(np.float32)
        found = [
            (p.grad.norm().item(), (p.grad * torch.from_numpy(drawn(n, tuple(p.shape)))).sum())
            for n, p in sorted(network.named_parameters())
        ]
        yield f"{name} {mode} gradients", np.array(found)
    running = [b.sum().item() for n, b in sorted(network.named_buffers()) if b.is_floating_point()]
    yield f"{name} running", np.array(running)


def import_peers() -> None:
    """torchvision's Python, where its compiled operators do not fit this torch."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import_peers.kept = library


def networks() -> Iterator[tuple[str, nn.Module]]:
    import timm
    import torchvision

    yield (
        "vit",
        timm.models.vision_transformer.VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=3,
            num_heads=4,
            num_classes=NETWORKS["vit"],
        ),
    )
    for name in ("resnet18", "resnet50"):
        yield name, getattr(torchvision.models, name)(num_classes=NETWORKS[name])


def operations() -> Iterator[tuple[str, np.ndarray]]:
    """Every operation's bytes at magnitude 9 and its checksums at all 31."""
    from torchvision.transforms import InterpolationMode, autoaugment

    for kind in ("colour", "grey"):
        images = torch.from_numpy(pictures(kind))
        space = autoaugment.RandAugment()._augmentation_space(31, tuple(images.shape[2:]))
        sums = []
        for number, (name, (magnitudes, signed)) in enumerate(space.items()):
            assert signed == (len(signs(number)) == 2)
            for negative in signs(number):
                for bin in range(31):
                    strength = float(magnitudes[bin]) if magnitudes.ndim else 0.0
                    strength *= -1.0 if negative else 1.0
                    made = torch.stack([
                        autoaugment._apply_op(
                            image, name, strength, InterpolationMode.NEAREST, [60.0] * len(image)
                        )
                        for image in images
                    ])  # fmt: skip
                    sums.append(zlib.crc32(made.numpy().tobytes()))
                    if bin == 9:
                        yield f"{kind} {name} {negative}", made.numpy()
        yield f"{kind} sums", np.array(sums, dtype=np.uint32)


def mixes() -> Iterator[tuple[str, np.ndarray]]:
    """torchvision's mixup and CutMix at stated shares and centres."""
    from unittest import mock

    from torchvision.transforms import v2

    x = torch.from_numpy(drawn("mix", (3, 2, 8, 10)))
    labels = torch.tensor([0, 2, 1])
    for number, (share, row, column) in enumerate(SHARES):
        cut, mixup = (kind(alpha=1.0, num_classes=3) for kind in (v2.CutMix, v2.MixUp))
        cut._dist = mixup._dist = mock.Mock(sample=lambda shape, share=share: share)
        centre = [torch.tensor([column]), torch.tensor([row])]
        with mock.patch("torch.randint", side_effect=centre):
            yield f"cutmix {number} x", (out := cut(x, labels))[0].numpy()
        yield f"cutmix {number} y", out[1].numpy()
        out = mixup(x, labels)
        yield f"mixup {number} x", out[0].numpy()
        yield f"mixup {number} y", out[1].numpy()


def main() -> None:
    import_peers()
    found = dict(operations()) | dict(mixes())
    for name, network in networks():
        found |= dict(measured(name, network))
    np.savez_compressed(FILE, **found)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {len(found)} arrays")


if __name__ == "__main__":
    main()
