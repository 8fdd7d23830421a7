"""The two recipes that `etude start` writes: commented YAML sized to the pictures and the machine.

Called by starting.py. The files extend the shipped digits recipes and state every field a person
may want to change, with the reason for its value beside it.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from etude.core.config import Config

CORES_FOR_64 = 8  # with fewer cores and no GPU, 64 pixels take longer than a person waits
GIGABYTES_FOR_256 = 20.0  # of GPU memory
ENCODER = Path("data/minilm")  # what reads captions, as `etude data fetch minilm` leaves it
ENCODER_WIDTH, TOKENS = 384, 32  # its features, and tokens of a caption that are read


class Size(Config):
    """Model and length for one picture size on one kind of machine."""

    widths: tuple[int, ...]  # of the autoencoder; each after the first halves the picture
    layers: int
    autoencoder_images: int
    autoencoder_batch: int
    hidden: int
    depth: int
    heads: int
    images: int
    batch: int
    bf16: bool


CPU_SIZES = {
    32: Size(
        widths=(32, 48, 64), layers=1, autoencoder_images=12_000, autoencoder_batch=32,
        hidden=192, depth=6, heads=6, images=60_000, batch=64, bf16=False,
    ),
    64: Size(
        widths=(32, 48, 64), layers=1, autoencoder_images=40_000, autoencoder_batch=32,
        hidden=256, depth=8, heads=8, images=200_000, batch=64, bf16=False,
    ),
    256: Size(
        widths=(32, 64, 96, 128), layers=1, autoencoder_images=100_000, autoencoder_batch=8,
        hidden=384, depth=12, heads=6, images=500_000, batch=32, bf16=False,
    ),
}  # fmt: skip
GPU_SIZES = {
    32: Size(
        widths=(64, 128, 128), layers=2, autoencoder_images=400_000, autoencoder_batch=256,
        hidden=384, depth=12, heads=6, images=4_000_000, batch=256, bf16=True,
    ),
    64: Size(
        widths=(64, 128, 256), layers=2, autoencoder_images=400_000, autoencoder_batch=128,
        hidden=384, depth=12, heads=6, images=4_000_000, batch=256, bf16=True,
    ),
    256: Size(
        widths=(64, 128, 256, 256), layers=2, autoencoder_images=800_000, autoencoder_batch=32,
        hidden=768, depth=12, heads=12, images=8_000_000, batch=256, bf16=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What recipes are sized to.

    Attributes:
        cores: processor cores this process may use.
        memory: main memory in 10^9 bytes.
        gpu: memory of the first GPU in 10^9 bytes, 0 without one.
    """

    cores: int
    memory: float
    gpu: float

    @classmethod
    def this(cls) -> "Machine":
        """The machine this process runs on."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        gpu = 0.0
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0).total_memory / 1e9
        return cls(len(os.sched_getaffinity(0)), memory, gpu)

    def __str__(self) -> str:
        gpu = f"a GPU of {self.gpu:.0f} GB" if self.gpu else "no GPU"
        return f"{self.cores} cores, {self.memory:.0f} GB of memory, {gpu}"

    def image_size(self, short_sides: Sequence[int]) -> int:
        """32, 64 or 256: the largest the pictures' median short side and the machine allow."""
        median = statistics.median(short_sides)
        if self.gpu:
            largest = 256 if self.gpu >= GIGABYTES_FOR_256 else 64
        else:
            largest = 64 if self.cores >= CORES_FOR_64 else 32
        return max(size for size in (32, 64, 256) if size == 32 or size <= min(largest, median))

    def size(self, image_size: int) -> Size:
        """Model and length for pictures of `image_size`."""
        return (GPU_SIZES if self.gpu else CPU_SIZES)[image_size]

    def strategy(self, image_size: int) -> str:
        """The recipe's `strategy` line."""
        if self.size(image_size).bf16:
            return "strategy: {kind: zero, stage: 1, precision: bf16}"
        return "strategy: {kind: local, precision: fp32}"


@dataclass(frozen=True)
class Pictures:
    """The data set that a recipe is written for; `train` is its number of training pictures."""

    name: str
    folder: Path
    size: int
    channels: int
    classes: int
    train: int
    captions: bool

    @property
    def asked_by_text(self) -> bool:
        """Whether captions are all that tells what a picture shows."""
        return self.captions and self.classes == 1


def autoencoder_recipe(pictures: Pictures, machine: Machine) -> str:
    """YAML of an autoencoder recipe that extends autoencoder/digits."""
    size = machine.size(pictures.size)
    latent = latent_side(pictures, machine)
    rounds = 4 if size.autoencoder_images >= 40_000 else 2
    return f"""\
# An autoencoder for {pictures.name}: {pictures.size} x {pictures.size} pixels to \
{latent} x {latent} x 4 latents.
# Written by `etude start` for {machine}.
# Change what you like; `etude recipes show THIS_FILE` says where every value comes from.
extends: autoencoder/digits
name: {pictures.name}-autoencoder
description: Autoencoder for {pictures.name}
expects: {{hardware: "{machine}", hours: null, result: not measured}}
{_data(pictures, machine)}
model:
  in_channels: {pictures.channels}
  latent_channels: 4
  # Each width after the first halves the picture. Wider keeps more detail and takes longer.
  block_out_channels: {list(size.widths)}
  layers_per_block: {size.layers}
  norm_num_groups: 8
  kl_weight: 1.0e-5
optim: {{lr: {"5.0e-4" if machine.gpu else "1.0e-3"}, warmup_images: \
{size.autoencoder_images // 20}, schedule: cosine, clip: 1.0, ema: [0.99]}}
{machine.strategy(pictures.size)}
loop:
  # {size.autoencoder_images / pictures.train:,.0f} times every training picture.
  images: {size.autoencoder_images}
  global_batch: {size.autoencoder_batch}
  # Out of memory? Halve the micro batch: the result stays the same.
  micro_batch: {size.autoencoder_batch}
  log_every: {size.autoencoder_images // 20 // size.autoencoder_batch * size.autoencoder_batch}
  evaluate_every: {size.autoencoder_images // rounds}
  checkpoint: {{every_images: {size.autoencoder_images // rounds}}}
"""


def latent_recipe(pictures: Pictures, machine: Machine) -> str:
    """YAML of a latent diffusion recipe that extends ldm/digits."""
    size = machine.size(pictures.size)
    captions, family, asked = "", "", ""
    columns, left_out = pictures.classes, "class"
    if pictures.asked_by_text:
        captions = f"# Asked by caption, which the text encoder in {ENCODER} reads.\n"
        family, columns, left_out = "\n  family: pixart", 8, "caption"
        asked = f"""
  conditioning: {{semantic: text, text_tokens: {TOKENS}, text_width: {ENCODER_WIDTH}}}
# Captions are read up to this length; another encoder has another text_width.
text: {{encoders: [{ENCODER}], max_tokens: {TOKENS}}}"""
    elif pictures.captions:
        captions = "# Asked by class alone; the captions are in the shards all the same.\n"
    return f"""\
# A latent diffusion model for {pictures.name}, in the latents of {pictures.name}-autoencoder.
# Written by `etude start` for {machine}.
{captions}extends: ldm/digits
name: {pictures.name}-ldm
description: Latent diffusion for {pictures.name}
expects: {{hardware: "{machine}", hours: null, result: not measured}}
# The run that `etude train ... --run {pictures.name}-autoencoder` writes.
autoencoder: runs/{pictures.name}-autoencoder
{_data(pictures, machine)}
# Random crops and flips are encoded once, in this many variants of every picture.
latents: {{variants: {8 if pictures.train < 5000 else 2}}}
model:{family}
  input_size: {latent_side(pictures, machine)}
  in_channels: 4
  patch_size: 2
  hidden_size: {size.hidden}
  depth: {size.depth}
  num_heads: {size.heads}
  num_classes: {pictures.classes}
  learn_sigma: false{asked}
# One sample in ten trains without its {left_out}, which makes guidance possible.
drop_semantic: 0.1
optim: {{lr: {"3.0e-4" if machine.gpu else "1.0e-3"}, betas: [0.9, 0.99], warmup_images: \
{size.images // 20}, schedule: cosine, clip: 1.0, ema: [{"0.999" if machine.gpu else "0.99"}]}}
{machine.strategy(pictures.size)}
loop:
  # {size.images / pictures.train:,.0f} times every training picture.
  images: {size.images}
  global_batch: {size.batch}
  # Out of memory? Halve the micro batch: the result stays the same.
  micro_batch: {size.batch}
  log_every: {size.images // 50 // size.batch * size.batch}
  # How often grids, nearest training pictures and held-out losses are drawn.
  evaluate_every: {size.images // 10}
  checkpoint: {{every_images: {size.images // 10}}}
sampler: {{method: heun, steps: 16}}
grid: {{per_class: {max(1, min(8, 32 // columns))}}}
"""


def latent_side(pictures: Pictures, machine: Machine) -> int:
    """Height and width of the latents."""
    return pictures.size >> (len(machine.size(pictures.size).widths) - 1)


def _data(pictures: Pictures, machine: Machine) -> str:
    return f"""\
data:
  shards: {pictures.folder / "train"}
  # Mirroring suits most photographs; turn it off for text, digits or signs.
  augment: {{image_size: {pictures.size}, crop: random, scale: [0.7, 1.0], flip: true, \
channels: {pictures.channels}}}
  workers: {max(1, min(8, machine.cores - 1))}
held_out: {pictures.folder / "test"}"""
