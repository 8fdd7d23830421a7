"""Writes inception.npz: features of torch-fidelity 0.4.0, pytorch-fid 0.3.0 and clean-fid 0.1.35.

    python tests/peers/make_inception.py

needs the three, Pillow and torchvision 0.28.0 beside torch 2.13. `test_inception.py` compares with
the file and needs none; the weights and pictures that both sides start from are drawn here, by
name. clean-fid takes NVIDIA's network from the net: here it is given torch-fidelity's with equal
weights; reading, resizing and batching of the pictures are its own.
"""

import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

FILE = Path(__file__).parent / "inception.npz"
TAPS = ("2048", "64", "192", "768", "logits", "logits_unbiased")
KEPT = 9  # every ninth number of a feature vector is stored
SIZES = ((256, 256), (71, 102), (411, 333))  # height, width


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers (float64) that follow from the name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight away from zero and one, by its name in torchvision's layout and its shape."""
    numbers = drawn(name, shape)
    if len(shape) > 1:
        numbers *= (2.0 / np.prod(shape[1:])) ** 0.5
    elif name.endswith("running_var"):
        numbers = 1.0 + 0.3 * np.abs(numbers)
    else:
        numbers = 0.2 * numbers + (1.0 if name.endswith("bn.weight") else 0.0)
    return torch.from_numpy(numbers.astype(np.float32))


def pictures() -> list[np.ndarray]:
    """Three pictures (H, W, 3) uint8 of waves and noise."""
    made = []
    for number, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width][..., None] / 30.0
        waves = np.sin(x * np.array([1.0, 2.0, 0.7]) + number) * np.cos(y * np.array([0.5, 1, 3.0]))
        noise = drawn(f"picture {number}", (height, width, 3))
        made.append((128 + 90 * waves + 25 * noise).clip(0, 255).astype(np.uint8))
    return made


def import_peers() -> None:
    """torchvision's Python, where its compiled operators do not fit this torch."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import_peers.kept = library


def torch_fidelity(weights: Path) -> tuple[torch.nn.Module, Iterator[tuple[str, np.ndarray]]]:
    """Its network, filled and written to `weights` on the way, and every feature of its own."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    kind = module.FeatureExtractorInceptionV3
    with mock.patch.object(kind, "load_state_dict"), mock.patch("torch.load"):
        empty = kind("inception", list(TAPS), feature_extractor_weights_path="none")
    state = {n: value(n, tuple(v.shape)) if v.dtype == torch.float32 else v
             for n, v in empty.state_dict().items()}  # fmt: skip
    torch.save(state, weights)
    network = kind("inception", list(TAPS), feature_extractor_weights_path=str(weights))
    spatial: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: spatial.append(out[:, :7]))

    def features() -> Iterator[tuple[str, np.ndarray]]:
        for number, picture in enumerate(pictures()):
            x = torch.from_numpy(picture).permute(2, 0, 1)[None]
            for tap, found in zip(TAPS, network(x), strict=True):
                yield f"tf1 {number} {tap}", found[0].numpy()
            yield f"tf1 {number} spatial", spatial.pop()[0].permute(1, 2, 0).numpy().ravel()

    return network, features()


def pytorch_fid(weights: Path, files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    from pytorch_fid import fid_score, inception

    with mock.patch.object(
        inception, "load_state_dict_from_url", lambda *_, **__: torch.load(weights)
    ):
        for block, tap in enumerate(("64", "192", "768", "2048")):
            network = inception.InceptionV3([block]).eval()
            for number, file in enumerate(files):
                found = fid_score.get_activations([file], network, 1, int(tap), "cpu", 0)
                yield f"pytorch {number} {tap}", found[0]


def clean_fid(network: torch.nn.Module, files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    from cleanfid import fid

    trunk = _after_resizing(network)
    for number, file in enumerate(files):
        found = fid.get_files_features(
            [str(file)], model=trunk, num_workers=0, batch_size=1, device="cpu", verbose=False
        )
        yield f"clean {number} 2048", found[0]


def _after_resizing(network: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network from 299 x 299 levels on, as clean-fid calls NVIDIA's."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    def run(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2:] == (299, 299) and x.dtype == torch.float32
        same = mock.patch.object(
            module, "interpolate_bilinear_2d_like_tensorflow1x", lambda *_, **__: x
        )
        with same:  # what it is given here is replaced by x
            return network(torch.zeros(len(x), 3, 1, 1, dtype=torch.uint8))[0]

    return run


@torch.no_grad()
def main() -> None:
    import_peers()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.png" for number in range(len(SIZES))]
        for file, picture in zip(files, pictures(), strict=True):
            Image.fromarray(picture).save(file)
        weights = Path(folder) / "weights.pth"
        network, found = torch_fidelity(weights)
        made = dict(found)
        made |= dict(pytorch_fid(weights, files)) | dict(clean_fid(network, files))
    made = {name: array.astype(np.float32)[::KEPT] for name, array in made.items()}
    np.savez_compressed(FILE, **made)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {len(made)} arrays")


if __name__ == "__main__":
    main()
