"""Batches from shards, by position; called by training, sampling of references and evaluation.

`fetch` is the one place where a batch is made: position → order → sample → header → crop and flip →
decoder. It depends on nothing but the positions, so any rank, worker or resume gets the same batch.
`batches` runs it ahead in a thread. An unreadable sample is replaced by another one that is a
function of (seed, position, attempt) alone.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from pydantic import field_validator

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.rng import Stream, bits

from . import decode_dali, decode_torch
from .augment import AugmentConfig, Geometry, geometry
from .decode_torch import to_signed
from .order import Order, Ordering, window_of
from .picture import BadPicture, Picture, probe
from .shards import Sample, ShardSet

_MAX_ATTEMPTS = 32
_DALI_MIN_SIDE = 64


class DataConfig(Config):
    """Which pictures, in which order, decoded how."""

    shards: str = option(help="folder of WebDataset tars")
    augment: AugmentConfig = option(help="crop, flip and size")
    order: str = option(
        "global",
        "global: a permutation of all samples per pass; windowed(shards=W): only W shards are read"
        " at a time",
    )
    decoder: Literal["auto", "dali_if_installed", "dali", "torch"] = option(
        "auto",
        "auto: DALI where it is installed and decodes JPEGs of 64 pixels and more on a GPU, else"
        " torch; dali_if_installed: DALI for all pictures it can read, else torch",
        affects_result=False,
    )
    workers: int = option(0, "decoding threads; 0: one per core", affects_result=False, ge=0)
    prefetch: int = option(2, "batches made ahead", affects_result=False, ge=1)
    max_bad_rate: float = option(
        0.01,
        "stop when a larger share of the samples turns out unreadable",
        affects_result=False,
        ge=0,
        le=1,
    )
    verify: bool = option(False, "check the sha256 of all shards first", affects_result=False)
    index_folder: str | None = option(
        None, "where the shard index lies, if not beside the shards", affects_result=False
    )

    @field_validator("order")
    @classmethod
    def _check_order(cls, value: str) -> str:
        window_of(value)
        return value

    def open(self) -> ShardSet:
        """The shards this names."""
        return ShardSet(self.shards, verify=self.verify, index_folder=self.index_folder)


@dataclass
class Batch:
    """Consecutive or chosen positions and what they show.

    Attributes:
        positions: (B,) int64.
        keys: B sample keys.
        images: (B, C, S, S) float32 in [-1, 1], or None for latents.
        latents: (B, c, h, w) float32 scaled latents, or None for pictures.
        labels: (B,) int64, -1 without labels.
        control: (B,) float32 by name: crop_top, crop_left, crop_height, crop_width, height, width
            in pixels, flip 0 or 1, which is what really happened to each picture, and the
            scalars of its `.json`.
        captions: B texts, "" without captions.
        text: the captions' features by name, from a stream that was told how to make them.
        wait_seconds: how long the training loop waited for this batch.
    """

    positions: np.ndarray
    keys: list[str]
    images: torch.Tensor | None
    latents: torch.Tensor | None
    labels: torch.Tensor
    control: dict[str, torch.Tensor]
    captions: list[str] = field(default_factory=list)
    text: dict[str, torch.Tensor] = field(default_factory=dict)
    wait_seconds: float = 0.0


class Source:
    """What can make a batch of any positions; gives the endless prefetched stream.

    Attributes:
        features: texts to tensors by name, called in the stream's thread for its batches.
    """

    prefetch = 2
    features: Callable[[Sequence[str]], dict[str, torch.Tensor]] | None = None
    waited_seconds = 0.0
    ran_seconds = 0.0

    def fetch(self, positions: np.ndarray) -> Batch:
        """The batch of positions (B,) int64."""
        raise NotImplementedError

    @property
    def wait_share(self) -> float:
        """The share of time, since `batches` started, that the consumer waited for data."""
        return self.waited_seconds / self.ran_seconds if self.ran_seconds else 0.0

    def batches(
        self, start: int, global_batch: int, micro_batch: int, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Micro batches without end, in the order of the steps, made ahead in a thread.

        Micro batch j of rank r covers positions start + (j * world + r) * micro_batch onwards, so
        a step covers the same `global_batch` positions for every world size and micro batch.
        Closing the iterator ends the thread; an exception in it is raised here.

        Raises:
            UserError: `global_batch` is not a multiple of micro_batch * world.
        """
        if micro_batch < 1 or global_batch < 1 or global_batch % (micro_batch * world):
            raise UserError(
                f"global batch {global_batch} is not a multiple of micro batch {micro_batch} times"
                f" {world} processes; choose a multiple of {micro_batch * world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        return self._stream(start, micro_batch, rank, world)

    def _stream(self, start: int, micro_batch: int, rank: int, world: int) -> Iterator[Batch]:
        ready: queue.Queue = queue.Queue(self.prefetch)
        stop = threading.Event()

        def produce() -> None:
            micro = 0
            while not stop.is_set():
                first = start + (micro * world + rank) * micro_batch
                try:
                    item = self.fetch(np.arange(first, first + micro_batch, dtype=np.int64))
                    if self.features is not None:
                        item.text = self.features(item.captions)
                except BaseException as error:
                    item = error
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if isinstance(item, BaseException):
                    return
                micro += 1

        thread = threading.Thread(target=produce, name="etude-data", daemon=True)
        thread.start()
        began = time.perf_counter()
        try:
            while True:
                asked = time.perf_counter()
                item = ready.get()
                now = time.perf_counter()
                self.waited_seconds += now - asked
                self.ran_seconds += now - began
                began = now
                if isinstance(item, BaseException):
                    raise item
                yield replace(item, wait_seconds=now - asked)
        finally:
            stop.set()
            thread.join(timeout=60)


def _scalars(rows: list[Mapping[str, float]]) -> dict[str, torch.Tensor]:
    """(B,) float32 by name."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def substitute(seed: int, position: int, attempt: int, size: int) -> int:
    """The sample shown at `position` after `attempt` (from 0) unreadable ones before it."""
    words = bits(seed, Stream.SUBSTITUTE, np.array([position]), 2 * attempt + 2)[0, -2:]
    return ((int(words[0]) << 32) + int(words[1])) * size >> 64


def choose_decoder(data: ShardSet, config: DataConfig, device: torch.device) -> tuple[str, str]:
    """("dali" or "torch", one line that says why).

    On the CPU the two are equally fast for crops of JPEGs (benchmarks/dataload.py), so "auto" takes
    DALI for what it alone can do: JPEGs decoded on a GPU.
    """
    if config.decoder == "torch":
        return "torch", "torch decoder: as asked"
    missing = decode_dali.why_missing()
    if config.decoder == "dali":
        if missing:
            raise UserError(f"decoder: dali needs DALI ({missing}); type decoder: auto")
        return "dali", "DALI decoder: as asked"
    if missing:
        return "torch", f"torch decoder: DALI is not usable here ({missing})"
    if config.decoder == "dali_if_installed":
        return "dali", "DALI decoder: installed"
    if device.type != "cuda":
        return "torch", "torch decoder: on the CPU DALI is not faster (benchmarks/dataload.py)"
    suited, total = 0, min(len(data), 32)
    for number in range(total):
        try:
            picture = probe(data[number * len(data) // total].data)
        except BadPicture:
            continue
        side = min(picture.height, picture.width)
        suited += picture.kind == "jpeg" and picture.plain and side >= _DALI_MIN_SIDE
    if 2 * suited > total:
        return "dali", f"DALI decoder: {suited} of {total} pictures looked at are JPEGs for the GPU"
    return "torch", (
        f"torch decoder: {total - suited} of {total} pictures looked at are not JPEGs of"
        f" {_DALI_MIN_SIDE} pixels and more, which is what DALI decodes on a GPU"
    )


class Loader(Source):
    """Batches of training pictures.

    Attributes:
        bad: (key, reason) of each unreadable sample met so far.
        decoder_reason: one line saying which decoder runs and why.
        order: maps positions to samples.
    """

    def __init__(
        self,
        data: ShardSet,
        config: DataConfig,
        *,
        seed: int,
        order: Ordering | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            order: instead of `config.order`, for example of a growing pool.
            device: where DALI decodes and where the pictures are left; the torch decoder decodes
                on the CPU and copies.
        """
        self.data, self.config, self.seed = data, config, seed
        self.device = torch.device(device)
        self.prefetch = config.prefetch
        self.order = order or Order(len(data), seed, config.order, shard_sizes=data.shard_sizes)
        name, self.decoder_reason = choose_decoder(data, config, self.device)
        size, channels = config.augment.image_size, config.augment.channels
        workers = config.workers or os.cpu_count() or 1
        if name == "dali":
            self.decoder = decode_dali.Decoder(size, channels, workers, device=self.device)
        else:
            self.decoder = decode_torch.Decoder(size, channels, workers)
        self.bad: list[tuple[str, str]] = []
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def fetch(self, positions: np.ndarray) -> Batch:
        """The batch of positions (B,) int64.

        Raises:
            UserError: more samples than `max_bad_rate` allows are unreadable.
        """
        positions = np.asarray(positions, dtype=np.int64)
        indices = self.order.index(positions)
        attempts = np.zeros(len(positions), dtype=np.int64)
        samples: list[Sample | None] = [None] * len(positions)
        pictures: list[Picture | None] = [None] * len(positions)
        pending = range(len(positions))
        while True:
            for row in pending:
                samples[row], pictures[row] = self._readable(positions, indices, attempts, row)
            cut = geometry(
                self.config.augment,
                self.seed,
                positions,
                np.array([picture.height for picture in pictures], dtype=np.int64),
                np.array([picture.width for picture in pictures], dtype=np.int64),
            )
            images, faults = self.decoder.decode(samples, cut)
            if not faults:
                return self._batch(positions, samples, images, cut)
            for row, reason in faults.items():
                self.note_bad(int(indices[row]), samples[row].key, reason)
            pending = list(faults)

    def _readable(
        self,
        positions: np.ndarray,
        indices: np.ndarray,
        attempts: np.ndarray,
        row: int,
    ) -> tuple[Sample, Picture]:
        """The first candidate of a row whose bytes and header are sound."""
        while True:
            index = int(indices[row])
            if index not in self._reasons:
                try:
                    sample = self.data[index]
                    return sample, probe(sample.data)
                except BadPicture as error:
                    self.note_bad(index, self.data.key_of(index), str(error))
            if attempts[row] == _MAX_ATTEMPTS:
                key, reason = self.bad[-1]
                raise UserError(
                    f"{_MAX_ATTEMPTS} samples in a row in {self.data.folder} are unreadable, the"
                    f" last one {key}: {reason}; check the shards with data.verify=true"
                )
            position = int(positions[row])
            size = int(self.order.size_at(positions[row : row + 1])[0])
            indices[row] = substitute(self.seed, position, int(attempts[row]), size)
            attempts[row] += 1

    def note_bad(self, index: int, key: str, reason: str) -> None:
        """Counts an unreadable sample once; raises `UserError` above `max_bad_rate`."""
        with self._lock:
            if index in self._reasons:
                return
            self._reasons[index] = reason
            self.bad.append((key, reason))
            if len(self.bad) > self.config.max_bad_rate * len(self.data):
                named = "; ".join(f"{key}: {reason}" for key, reason in self.bad[:3])
                raise UserError(
                    f"{len(self.bad)} of {len(self.data)} samples in {self.data.folder} are"
                    f" unreadable, more than max_bad_rate={self.config.max_bad_rate} allows"
                    f" ({named}); repair them or raise data.max_bad_rate"
                )

    def _batch(
        self, positions: np.ndarray, samples: list[Sample], images: torch.Tensor, cut: Geometry
    ) -> Batch:
        return Batch(
            positions=positions,
            keys=[sample.key for sample in samples],
            images=to_signed(images.to(self.device, non_blocking=True)),
            latents=None,
            labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            control=_scalars([sample.scalars for sample in samples]) | cut.control(),
            captions=[sample.caption for sample in samples],
        )

    def close(self) -> None:
        """Ends the decoder's threads."""
        self.decoder.close()
