"""Latents computed once: writing a cache of posterior means and deviations, and training from it.

Called by training. Each picture is encoded in `variants` augmentations, whose crops and flips are
stored beside them, and the latent of a position is scale(mean + std * noise(position)), with
scale(z) = (z - shift) * factor (Rombach et al. 2022, section 3.1 and appendix G). A cache belongs
to one autoencoder, precision, preprocessing, seed and data set: its key is the sha256 over these.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.rng import Stream, integers, normal

from . import latent_cache
from .augment import Geometry, geometry
from .decode_torch import to_signed
from .index import SCALAR
from .latent_cache import GEOMETRY
from .loader import Batch, DataConfig, Loader, Source, substitute
from .order import Order
from .picture import BadPicture, probe
from .shards import ShardSet

Encoder = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def weights_key(module: torch.nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)};".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def latents_plan(
    data: ShardSet,
    config: DataConfig,
    key: str,
    seed: int,
    *,
    variants: int = 1,
    dtype: torch.dtype = torch.float32,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> dict[str, Any]:
    """What a cache depends on, field by field, and under "key" the sha256 over all of it.

    Args: as `encode_latents`.
    """
    if dtype not in (torch.float32, torch.float16):
        raise UserError(f"latents are stored as float32 or float16, not {dtype}")
    if variants < 1:
        raise UserError(f"latents need at least one variant per picture, not {variants}")
    # A cache without scalars keeps the key that it had before there were any.
    scalars = {"scalars": list(data.scalars)} if data.scalars else {}
    return latent_cache.keyed(
        {
            "autoencoder": key,
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            "dtype": str(dtype).removeprefix("torch."),
            "variants": variants,
            "augment": config.augment.model_dump(mode="json"),
            "data": data.fingerprint,
            "seed": seed,
        }
        | scalars
    )


def encode_latents(
    data: ShardSet,
    config: DataConfig,
    encoder: Encoder,
    folder: str | Path,
    key: str,
    seed: int,
    log: Log | None = None,
    *,
    variants: int = 1,
    dtype: torch.dtype = torch.float32,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> Path:
    """Writes the cache of `data` into `folder`, one file per shard; an interrupted one goes on.

    Args:
        encoder: pictures (B, C, S, S) float32 in [-1, 1] on `device` to (mean, std) of the raw
            latents, each (B, c, h, w).
        key: identity of the autoencoder's weights; `weights_key` gives one.
        seed: of the crops and flips.
        log: told the GB needed before anything is written, and the progress.
        variants: augmentations cached per picture.
        dtype: torch.float32 or torch.float16, as stored.
        scaling_factor, shift_factor: scale(z) = (z - shift_factor) * scaling_factor, applied when
            the cache is read.
        batch_size: pictures encoded at a time.
        rank, world: process r encodes shards r, r + world, ...; the one that finds every shard
            present publishes the cache.

    Returns:
        `folder`.

    Raises:
        UserError: the folder holds a cache with another key, or the disk is too small.
    """
    plan = latents_plan(
        data,
        config,
        key,
        seed,
        variants=variants,
        dtype=dtype,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if latent_cache.begin(folder, plan):
        return folder
    pictures = Loader(data, config, seed=seed, device=device)
    try:
        writer = _Writer(pictures, encoder, plan, folder, log, batch_size)
        for shard in range(rank, len(data.shard_sizes), world):
            writer.shard(shard)
    finally:
        pictures.close()
    latent_cache.publish(folder, plan, data)
    return folder


@dataclass
class _Writer:
    """Encodes shard after shard into one cache."""

    pictures: Loader
    encoder: Encoder
    plan: dict[str, Any]
    folder: Path
    log: Log | None
    batch_size: int
    told: bool = False

    def shard(self, shard: int) -> None:
        """Writes one shard's file unless it is there already."""
        path, key = latent_cache.file_of(self.folder, shard), self.plan["key"]
        if latent_cache.is_written(path, key):
            return
        data = self.pictures.data
        start = sum(data.shard_sizes[:shard])
        indices = np.arange(start, start + data.shard_sizes[shard])
        arrays: dict[str, np.ndarray] = {}
        for first in range(0, len(indices), self.batch_size):
            part = indices[first : first + self.batch_size]
            encoded = _encode(self.pictures, self.encoder, part, self.plan)
            if not self.told:
                _check_disk(self.folder, len(data), encoded, self.log)
                self.told = True
            for name, values in encoded.items():
                whole = (len(indices), *values.shape[1:])
                target = arrays.setdefault(name, np.zeros(whole, values.dtype))
                target[first : first + len(part)] = values
        latent_cache.write_shard(path, arrays, key, data, indices)
        if self.log is not None:
            self.log.info(f"latents: shard {shard + 1} of {len(data.shard_sizes)} is encoded")


def _encode(
    pictures: Loader, encoder: Encoder, indices: np.ndarray, plan: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Every variant of some samples: arrays (n, variants, ...) and valid (n,)."""
    heights, widths = np.ones(len(indices), np.int64), np.ones(len(indices), np.int64)
    rows, samples = [], []
    for row, index in enumerate(indices):
        try:
            sample = pictures.data[int(index)]
            picture = probe(sample.data)
        except BadPicture as error:
            key = pictures.data.key_of(int(index))
            pictures.note_bad(int(index), key, str(error))
            continue
        heights[row], widths[row] = picture.height, picture.width
        rows.append(row)
        samples.append(sample)
    if not samples:
        first = pictures.data.key_of(int(indices[0]))
        raise UserError(
            f"{len(indices)} pictures in a row, from {first} on, are unreadable; check the shards"
            " with data.verify=true"
        )
    valid = np.zeros(len(indices), dtype=np.uint8)
    valid[rows] = 1
    result: dict[str, np.ndarray] = {"valid": valid}

    def store(name: str, variant: int, chosen: Any, values: np.ndarray) -> None:
        whole = (len(indices), plan["variants"], *values.shape[1:])
        result.setdefault(name, np.zeros(whole, values.dtype))[chosen, variant] = values

    for variant in range(plan["variants"]):
        # A variant has a place of its own in the random streams, as a position has in training.
        places = indices * plan["variants"] + variant
        cut = geometry(pictures.config.augment, plan["seed"], places, heights, widths)
        images, faults = pictures.decoder.decode(samples, cut.select(rows))
        for row, reason in faults.items():
            pictures.note_bad(int(indices[rows[row]]), samples[row].key, reason)
            valid[rows[row]] = 0
        with torch.no_grad():
            posterior = encoder(to_signed(images.to(pictures.device)))
        for name, values in zip(("mean", "std"), posterior, strict=True):
            stored = values.to("cpu", getattr(torch, plan["dtype"])).numpy()
            store(name, variant, rows, stored)
        for name in GEOMETRY:
            store(name, variant, slice(None), np.asarray(getattr(cut, name), dtype=np.int64))
    return result


def _check_disk(folder: Path, count: int, encoded: dict[str, np.ndarray], log: Log | None) -> None:
    needed = count * sum(values[0].nbytes for values in encoded.values()) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if log is not None:
        log.info(f"latents: {needed:.3f} GB will be written to {folder}, {free:.1f} GB are free")
    if needed > free:
        raise UserError(
            f"{folder} has {free:.1f} GB free but the latents need {needed:.1f} GB;"
            " name a folder on a larger disk"
        )


class LatentLoader(Source):
    """Batches of latents from a cache, by position; the same interface as `Loader`.

    Attributes:
        plan: what the cache depends on.
        classes: class names.
        bad: samples that could not be encoded; others stand in for them as in `Loader`.
        order: maps positions to samples.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int,
        plan: dict[str, Any] | None = None,
        order: str = "global",
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        verify: bool = False,
    ) -> None:
        """Opens a complete cache; neither pictures nor autoencoder are needed.

        Args:
            seed: of order, variants and posterior noise.
            plan: the `latents_plan` this run needs; a cache with another one is refused.
            order: as in `DataConfig`.
            verify: compare the sha256 of every file with the manifest.

        Raises:
            UserError: no complete cache here, a damaged one, or one with another key.
        """
        folder = Path(folder)
        self.folder, self.seed, self.prefetch = folder, seed, prefetch
        self.device = torch.device(device)
        content = latent_cache.read_manifest(folder)
        self.plan, self.classes = content["plan"], content["classes"]
        if plan is not None:
            latent_cache.compare(folder, self.plan, plan)
        shards = [
            latent_cache.open_shard(folder, entry, self.plan, verify) for entry in content["shards"]
        ]
        self._arrays = [arrays for arrays, _ in shards]
        self.keys = [key for _, words in shards for key in words["keys"]]
        self._captions = [text for _, words in shards for text in words["captions"]]
        counts = [entry["count"] for entry in content["shards"]]
        self._ends = np.cumsum(counts)
        self.order = Order(len(self.keys), seed, order, shard_sizes=counts)
        self.valid = np.concatenate([arrays["valid"] for arrays in self._arrays]).astype(bool)
        self.bad = [(self.keys[row], "not encoded") for row in np.flatnonzero(~self.valid)]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of one latent."""
        return tuple(self._arrays[0]["mean"].shape[2:])

    def fetch(self, positions: np.ndarray) -> Batch:
        """The batch of positions (B,) int64; `latents` are scaled, float32."""
        positions = np.asarray(positions, dtype=np.int64)
        variants = integers(self.seed, Stream.VARIANT, positions, self.plan["variants"])
        indices = self.order.index(positions)
        for row in np.flatnonzero(~self.valid[indices]):
            indices[row] = self._stand_in(int(positions[row]))
        noise = normal(self.seed, Stream.POSTERIOR, positions, self.shape, self.device)
        return self._batch(positions, indices, variants.astype(np.int64), noise)

    def _batch(
        self,
        positions: np.ndarray,
        indices: np.ndarray,
        variants: np.ndarray,
        noise: torch.Tensor,
    ) -> Batch:
        rows = {name: self._gather(name, indices, variants) for name in ("mean", "std", *GEOMETRY)}
        latents = torch.from_numpy(rows["mean"]).to(self.device, torch.float32)
        std = torch.from_numpy(rows["std"]).to(self.device, torch.float32)
        latents = latents + std * noise
        return Batch(
            positions=positions,
            keys=[self.keys[index] for index in indices],
            images=None,
            latents=(latents - self.plan["shift_factor"]) * self.plan["scaling_factor"],
            labels=torch.from_numpy(self._gather("labels", indices)),
            control=self._scalars(indices)
            | Geometry(**{name: rows[name] for name in GEOMETRY}).control(),
            captions=[self._captions[index] for index in indices],
        )

    def _scalars(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(self._gather(SCALAR + name, indices))
            for name in self.plan.get("scalars", [])
        }

    def _stand_in(self, position: int) -> int:
        attempt = 0
        while not self.valid[index := substitute(self.seed, position, attempt, len(self))]:
            attempt += 1
        return index

    def _gather(
        self, name: str, indices: np.ndarray, variants: np.ndarray | None = None
    ) -> np.ndarray:
        shards = np.searchsorted(self._ends, indices, side="right")
        sample = self._arrays[0][name]
        shape = sample.shape[1:] if variants is None else sample.shape[2:]
        result = np.empty((len(indices), *shape), sample.dtype)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            values = self._arrays[shard][name]
            inside = indices[rows] - (self._ends[shard] - len(values))
            result[rows] = values[inside] if variants is None else values[inside, variants[rows]]
        return result
