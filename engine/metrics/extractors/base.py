"""What an extractor is, and the extractors by name; called by evaluation/extract.py and users.

A new extractor is one file in this folder, or anywhere, with one class under one decorator:

    @extractor("tiny")
    class Tiny(Backbone):
        version, input_size, channels, taps = "1", 32, 3, {"mean": 64}
        resize = "bilinear, antialiased"

        def __init__(self, weights: Path) -> None:
            super().__init__()
            state, self.weights_sha256 = ...
            self.network = ...

        def prepare(self, images, dtype):
            x = resize_antialiased(images.permute(0, 3, 1, 2).float(), self.input_size)
            return (x / 127.5 - 1.0).to(dtype)

        def forward(self, x, taps):
            return {"mean": self.network(x).mean((2, 3))}

`Extractor` does the rest: it checks and converts pictures, moves them, runs the network without
gradients in the precision that was asked for, and returns float32.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from etude.core.errors import UserError
from etude.core.registry import Registry

Pictures = torch.Tensor | np.ndarray | Sequence[torch.Tensor | np.ndarray]
DTYPES = {  # what the network's input has; tf32 multiplies float32 with ten bits of fraction
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Backbone(nn.Module):
    """A network with its preprocessing; its constructor takes (weights: Path, **options).

    Whatever an option changes must show in `version`, `resize`, `input_size` or `weights_sha256`,
    since the feature store knows features by those.

    Attributes:
        version: changes whenever the numbers do.
        weights_sha256: hash of the weights, "" for a network without any.
        input_size: side of the square picture that the network sees, pixels.
        resize: the rule that brings a picture to that size, as text.
        channels: 1 or 3, what `prepare` is given.
        taps: name -> length of every feature vector that `forward` can give, the default first.
        needs_weights: False for what has none; its constructor is then given None.
        verified: False where nobody checked that weights that have a name of their own are those.
        half: how bfloat16 and float16 are meant: "weights" converts the network once, "autocast"
            lets torch choose per operation and keeps the weights.
    """

    version: str = "1"
    weights_sha256: str = ""
    input_size: int
    resize: str
    channels: int = 3
    taps: Mapping[str, int]
    needs_weights: ClassVar[bool] = True
    verified: bool = True
    half: ClassVar[Literal["weights", "autocast"]] = "weights"

    def verifies(self, tap: str) -> bool:
        """Whether this tap's features are those that its name promises; "" for the default one."""
        return self.verified

    def check(self, taps: Sequence[str]) -> None:
        """Raise `UserError` where the weights at hand cannot give one of these taps."""

    def prepare(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The input of `forward`, in `dtype`, of pictures (B, H, W, channels) uint8."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        """Features (B, length) of the named taps, in any floating dtype."""
        raise NotImplementedError

    def convert(self, dtype: torch.dtype) -> None:
        """Make the network one of `dtype`; called once, before the first forward."""
        if self.half == "weights":
            self.to(dtype)


EXTRACTORS: Registry[type[Backbone]] = Registry(
    "extractor", "etude.metrics.extractors", "etude.extractors"
)


# Where `etude data fetch` puts weights, by extractor; looked at when nobody says where they are.
FETCHED = {
    "inception": "data/inception",
    "mobilenet": "data/mobilenet",
    "resnet50": "data/resnet50",
    "vgg16": "data/lpips",
}


def extractor(name: str) -> Callable[[type[Backbone]], type[Backbone]]:
    """The decorator that registers a `Backbone` under `name`."""
    return EXTRACTORS.named(name)


class Extractor:
    """A frozen map from pictures to features.

    Args:
        kind: a registered name: "inception", "classifier", "pixels", ...
        weights: the file or folder of the weights; "" for a kind without any.
        taps: which features; by default, and for "", the backbone's first.
        dtype: "float32"; "tf32" (CUDA only); "bfloat16" or "float16". Features are float32 always.
        device: where the network runs.
        compile: whether the forward goes through torch.compile, on CUDA as graphs that are
            replayed; the first call of every size of batch then takes longer.
        options: the kind's own.

    Attributes:
        kind, taps, dtype: as given.
        backbone: the network.
        name: of the first tap's features: the kind, and the tap where it is not the default one.
        version, weights_sha256, input_size, resize, channels: the backbone's.
        dim: length of the first tap's vector.
        dims: feature name -> length, for every tap.
        arithmetic: dtype and whether compiled, as text; part of the store's key.

    Raises:
        UserError: unknown kind, tap, dtype or option, or weights that are missing or wrong.
    """

    def __init__(
        self,
        kind: str,
        weights: str | Path = "",
        *,
        taps: Sequence[str] = (),
        dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "float32",
        device: torch.device | str = "cpu",
        compile: bool = False,
        **options: Any,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
        self.kind, self.dtype = kind, dtype
        self.arithmetic = f"{dtype}, compiled" if compile else dtype
        self._check_device(device)
        self.backbone = _open(kind, weights, options)
        self.taps = _known_taps(kind, self.backbone, taps)
        self.backbone.check(self.taps)
        self.dims = {
            _feature_name(kind, self.backbone, t): self.backbone.taps[t] for t in self.taps
        }
        self.name = next(iter(self.dims))
        self.backbone.requires_grad_(False).eval()
        if DTYPES[dtype] != torch.float32:
            self.backbone.convert(DTYPES[dtype])
        self._compile, self._forward = compile, self.backbone
        self.to(device)

    @property
    def version(self) -> str:
        return self.backbone.version

    @property
    def weights_sha256(self) -> str:
        return self.backbone.weights_sha256

    @property
    def input_size(self) -> int:
        return self.backbone.input_size

    @property
    def resize(self) -> str:
        return self.backbone.resize

    @property
    def channels(self) -> int:
        return self.backbone.channels

    @property
    def dim(self) -> int:
        return self.backbone.taps[self.taps[0]]

    def __call__(self, images: Pictures) -> torch.Tensor:
        """The first tap's features (B, dim) float32 of images (B, H, W, C) uint8, C of 1 or 3."""
        return self._infer(self.prepare(images), self.taps[:1])[self.taps[0]]

    def features(self, images: Pictures) -> dict[str, torch.Tensor]:
        """Feature name -> (B, length) float32 of every tap, from one forward.

        Args:
            images: (B, H, W, C) uint8, a tensor or an array; or a sequence of B arrays or tensors
                (H, W, C) of different sizes, each brought to the network's size by itself.
        """
        return self.infer(self.prepare(images))

    def called(self, features: str) -> str:
        """What figures call features of this name: FID is of the published network's alone."""
        known = self.backbone.verifies(features.partition("/")[2])
        return features if known else f"unverified {features}"

    def to(self, device: torch.device | str) -> "Extractor":
        """Move to a device; returns itself."""
        self._check_device(device)
        self.backbone.to(device)
        self.device = torch.device(device)
        if self._compile:
            graphs = "reduce-overhead" if self.device.type == "cuda" else None
            self._forward = torch.compile(self.backbone, mode=graphs)
        return self

    @torch.no_grad()
    def prepare(self, images: Pictures) -> torch.Tensor:
        """The network's input, on its device, of pictures as `features` takes them."""
        if isinstance(images, Sequence):  # of several sizes
            return torch.cat([self.prepare(image[None]) for image in images])
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, requirements="CW"))
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                f"pictures must be uint8 (B, H, W, 1 or 3), got {images.dtype} {(*images.shape,)}"
            )
        images = to_channels(images.to(self.device), self.backbone.channels)
        with _own_arithmetic(self.device, "ieee"):
            return self.backbone.prepare(images, DTYPES[self.dtype])

    def infer(self, prepared: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `features`, of what `prepare` gave."""
        found = self._infer(prepared, self.taps)
        return {_feature_name(self.kind, self.backbone, tap): found[tap] for tap in self.taps}

    @torch.no_grad()
    def _infer(self, prepared: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        dtype = DTYPES[self.dtype]
        mixed = dtype != torch.float32 and self.backbone.half == "autocast"
        run_in = torch.autocast(self.device.type, dtype) if mixed else nullcontext()
        precision = "tf32" if self.dtype == "tf32" else "ieee"
        with _own_arithmetic(self.device, precision), run_in:
            found = self._forward(prepared, tuple(taps))
        # A replayed graph writes its next features where these are.
        return {tap: found[tap].to(torch.float32, copy=self._compile) for tap in taps}

    def _check_device(self, device: torch.device | str) -> None:
        if self.dtype == "tf32" and torch.device(device).type != "cuda":
            raise UserError("tf32 is an arithmetic of CUDA devices; set dtype=float32 on a CPU")


def load_extractor(spec: str, weights: str | Path = "", **options: Any) -> Extractor:
    """The extractor that `spec` names: "inception", or "inception/logits" for another tap.

    Args:
        weights: where the weights are: a file or a folder, as the kind says.
        options: `dtype`, `device` and `compile` of `Extractor`, and the kind's own, such as
            `input_size` of "pixels".

    Raises:
        UserError: as `Extractor`.
    """
    kind, slash, tap = spec.partition("/")
    if slash and not tap:
        raise UserError(f"{spec!r} names no features: write {kind}/TAP, or {kind} alone")
    if tap:
        options["taps"] = (tap,)
    return Extractor(kind, weights, **options)


def taps_by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Extractor -> its taps, "" for the first, from names such as "inception" and "clip/pooled"."""
    taps: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        kind, _, tap = name.partition("/")
        taps.setdefault(kind, []).append(tap)
    return taps


def preprocessing(extractor: Extractor) -> str:
    """One line that fixes how uint8 pictures reach the network; part of the store's key."""
    return f"{extractor.resize} to {extractor.input_size}, {extractor.channels} channels"


def to_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """uint8 (B, H, W, C) -> uint8 (B, H, W, channels): grey is repeated, and colour becomes
    ITU-R BT.601 luma in Pillow's integers, as reading a colour file as grey gives it.
    """
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return images.expand(-1, -1, -1, 3)
    share = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images.device)
    return (((images.int() * share).sum(3, keepdim=True) + 0x8000) >> 16).to(torch.uint8)


def resize_antialiased(x: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear with antialiasing, no rounding; (B, C, H, W) -> (B, C, size, size)."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _open(kind: str, weights: str | Path, options: dict[str, Any]) -> Backbone:
    made = EXTRACTORS.get(kind)
    known = list(inspect.signature(made).parameters)[1:]
    for name in options:
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"the extractor {kind!r} has no option {name!r}; {there}")
    if made.needs_weights and not str(weights):
        raise UserError(f"the {kind} extractor needs weights; set its weights to a file or folder")
    if not made.needs_weights and str(weights):
        raise UserError(f"the {kind} extractor has no weights; leave out {weights}")
    return made(Path(weights) if made.needs_weights else None, **options)


def _known_taps(kind: str, backbone: Backbone, taps: Sequence[str]) -> tuple[str, ...]:
    """Taps without repetition; "" and no tap at all stand for the default one."""
    default = next(iter(backbone.taps))
    for tap in taps:
        if tap and tap not in backbone.taps:
            there = ", ".join(backbone.taps)
            raise UserError(f"the extractor {kind!r} has no features {tap!r}; choose of {there}")
    return tuple(dict.fromkeys(tap or default for tap in taps or ("",)))


def _feature_name(kind: str, backbone: Backbone, tap: str) -> str:
    return kind if tap == next(iter(backbone.taps)) else f"{kind}/{tap}"


@contextmanager
def _own_arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Neither the caller's autocast nor the process's way to multiply float32 changes features.

    cuDNN's own default would be TF32, and an evaluation inside a trainer finds what that has set.
    """
    if device.type == "cuda":
        places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    else:
        places = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = precision
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for place, old in zip(places, before, strict=True):
            place.fp32_precision = "none"  # what stands above it counts, if it did before
            if place.fp32_precision != old:
                place.fp32_precision = old
