"""Files of Inception weights in the layouts that others publish, under one set of names.

Called by inception.py. The names are the TensorFlow graph's, as NVIDIA's TorchScript and the file
of `etude data fetch inception` have them: `mixed_4.tower_1.conv_2` has a `weight` and the
normalisation's `beta`, `mean` and `var`; the classifier is `output`. pytorch-fid's and
torch-fidelity's files have torchvision's names (`Mixed_6b.branch7x7dbl_3.conv.weight`, `.bn.bias`,
...; `fc`) and, since a batch normalisation of torch has one, a scale, which goes into `weight` and
`mean`.
"""

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.core.files import file_sha256

from .inception_network import Inception
from .weights import fill, read_tensors, tensors_sha256

# Of the fetched file's tensors, and the first digits of pytorch-fid's and torch-fidelity's file,
# which its name states.
TENSORS_SHA256 = "eb0874a8469bcfa841c312481d913c32879e7febddb973d4c65e068f69aee8a8"
PUBLISHED_FILE = "6726825d"
FILES = ("inception.safetensors", "default_1.pt")

_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_TOWERS = {  # torchvision's branches of each kind of block, and the graph's names of their layers
    "A": {"branch5x5_": ("tower", 2), "branch3x3dbl_": ("tower_1", 3)},
    "B": {"branch3x3dbl_": ("tower", 3)},
    "C": {"branch7x7_": ("tower", 3), "branch7x7dbl_": ("tower_1", 5)},
    "D": {"branch3x3_": ("tower", 2), "branch7x7x3_": ("tower_1", 4)},
}
_ALONE = {
    "A": {"branch1x1": "conv", "branch_pool": "tower_2.conv"},
    "B": {"branch3x3": "conv"},
    "C": {"branch1x1": "conv", "branch_pool": "tower_2.conv"},
    "D": {},
    "E": {
        "branch1x1": "conv",
        "branch3x3_1": "tower_conv",
        "branch3x3_2a": "tower_mixed_conv",
        "branch3x3_2b": "tower_mixed_conv_1",
        "branch3x3dbl_1": "tower_1_conv",
        "branch3x3dbl_2": "tower_1_conv_1",
        "branch3x3dbl_3a": "tower_1_mixed_conv",
        "branch3x3dbl_3b": "tower_1_mixed_conv_1",
        "branch_pool": "tower_2_conv",
    },
}
_BLOCKS = dict(
    zip(
        ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"),
        "AAABCCCCDEE",
        strict=True,
    )
)


def torchvision_names() -> dict[str, str]:
    """torchvision's name of every convolution -> the graph's."""
    return dict(_names())


def _names() -> Iterator[tuple[str, str]]:
    for number, name in enumerate(_STEM):
        yield f"Conv2d_{name}", _numbered("conv", number)
    for number, (name, kind) in enumerate(_BLOCKS.items()):
        block = _numbered("mixed", number)
        for theirs, ours in _ALONE[kind].items():
            yield f"Mixed_{name}.{theirs}", f"{block}.{ours}"
        for theirs, (tower, length) in _TOWERS.get(kind, {}).items():
            for layer in range(length):
                place = f"{block}.{tower}.{_numbered('conv', layer)}"
                yield f"Mixed_{name}.{theirs}{layer + 1}", place


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def load_inception(place: Path, check: bool = True) -> tuple[Inception, str]:
    """The network filled from a file in any of the layouts, not folded, and its weights' sha256.

    Args:
        place: a file (.safetensors, .pth or TorchScript), or the folder that was fetched.
        check: refuse weights other than those of inception-2015-12-05.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    path = _file_at(place)
    if not path.is_file():
        raise UserError(f"no Inception weights at {place}; type: etude data fetch inception")
    state = _under_our_names(_read(path))
    network = Inception(classes=1008 if "output.weight" in state else 0)
    sha256 = fill(network, state, path)
    if check and not _known(network, path):
        raise UserError(
            f"{path} holds other weights than those of inception-2015-12-05, whose distances alone "
            f"are called FID; type: etude data fetch inception, or set check=false, and figures "
            f"say that their features are unverified"
        )
    return network, sha256


def _known(network: Inception, path: Path) -> bool:
    trunk = {n: v for n, v in network.state_dict().items() if not n.startswith("output.")}
    if tensors_sha256(trunk) == TENSORS_SHA256:
        return True
    return is_published_file(path)


def is_published_file(place: Path) -> bool:
    """Whether a place that `load_inception` takes is the published file, classifier and all."""
    return file_sha256(_file_at(place)).startswith(PUBLISHED_FILE)


def _file_at(place: Path) -> Path:
    inside = [place / name for name in FILES if (place / name).is_file()]
    return inside[0] if inside else place


def _read(path: Path) -> dict[str, Tensor]:
    """A file's tensors; TorchScript is opened for its state dict alone."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            script = any("/code/" in name for name in archive.namelist())
        if script:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates reading TorchScript
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
    return read_tensors(path, "Inception")[0]


def _under_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the graph's names; unknown ones keep theirs."""
    state = {n.removeprefix("net.").removeprefix("layers."): v for n, v in state.items()}
    made = {}
    for theirs, ours in torchvision_names().items():
        if f"{theirs}.conv.weight" not in state:
            continue
        weight = state.pop(f"{theirs}.conv.weight")
        found = {n: state.pop(f"{theirs}.bn.{n}", None) for n in _OF_A_NORM}
        scale = found["weight"]
        if scale is not None:
            weight = weight * scale[:, None, None, None]
            found["running_mean"] = found["running_mean"] * scale
        made[f"{ours}.weight"] = weight
        made |= {f"{ours}.{_OF_A_NORM[n]}": v for n, v in found.items() if n != "weight"}
    for theirs in ("fc.weight", "fc.bias"):
        if theirs in state:
            made[theirs.replace("fc", "output")] = state.pop(theirs)
    return {n: v for n, v in (made | state).items() if v is not None}


_OF_A_NORM = {"weight": "", "bias": "beta", "running_mean": "mean", "running_var": "var"}
