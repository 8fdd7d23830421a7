"""Decoding with NVIDIA DALI, fed with our bytes and our crops; the only importer of nvidia.dali.

Called by the loader. DALI's readers, shuffling and random numbers are not used: an external source
hands over encoded bytes with crop box and flip, and `image_slice` decodes the box alone. Pictures
that decoders read differently (palettes, transparency, 16 bits, CMYK, rotated ones, other formats)
go to the torch decoder, as does a whole batch in which DALI fails, so both skip the same pictures.
Pixels agree with the torch decoder within `MEAN_BOUND` and `MAX_BOUND`.
"""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from etude.core.errors import UserError

from . import decode_torch
from .augment import Geometry
from .decode_torch import to_signed
from .picture import probe
from .shards import Sample

# Differences from the torch decoder, in levels of 255: the mean over any picture, and the largest
# of any pixel, which only white noise comes near (measured: 0.81 and 24; smooth pictures 0.59 and
# 7). DALI tabulates the resize filter, and takes grey from colour before resizing as JPEG does.
MEAN_BOUND = 1.0
MAX_BOUND = 32


def why_missing() -> str:
    """Why DALI cannot be used, "" when it can."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):
        found = False
    return "" if found else "nvidia-dali-cuda130 is not installed"


class Decoder:
    """Decodes batches with DALI on the CPU, or on the GPU when `device` is one.

    Args:
        image_size: side of the result in pixels.
        channels: 1 or 3.
        workers: threads.
        device: "cpu", or a CUDA device, where JPEGs are then decoded and results stay.
    """

    name = "dali"

    def __init__(
        self,
        image_size: int,
        channels: int,
        workers: int = 1,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        missing = why_missing()
        if missing:
            raise UserError(f"decoding with DALI needs it: {missing}; type decoder: torch")
        logging.getLogger("nvidia.dali").setLevel(logging.WARNING)
        self.image_size, self.channels = image_size, channels
        self.workers, self.device = max(1, workers), torch.device(device)
        self.twin = decode_torch.Decoder(image_size, channels, workers)
        self.fallbacks = 0
        self._pipeline: Any = None
        self._capacity = 0

    def __call__(self, samples: Sequence[Sample], geometry: Geometry) -> torch.Tensor:
        """Training pictures (B, C, S, S) float32 in [-1, 1]; raises `UserError` on a bad one."""
        images, faults = self.decode(samples, geometry)
        for row, reason in faults.items():
            raise UserError(f"{samples[row].shard}: {samples[row].key}: {reason}")
        return to_signed(images)

    def decode(
        self, samples: Sequence[Sample], geometry: Geometry
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Pictures (B, S, S, C) uint8, and the reason for each row that could not be decoded."""
        ours = [row for row, sample in enumerate(samples) if _suits(sample)]
        others = sorted(set(range(len(samples))) - set(ours))
        shape = (len(samples), self.image_size, self.image_size, self.channels)
        images, faults = torch.zeros(shape, dtype=torch.uint8, device=self.device), {}
        if ours:
            try:
                decoded = self._run(samples, geometry, ours)
                images.index_copy_(0, _rows(ours, images), decoded)
            except RuntimeError:
                # DALI does not say which picture failed, and its pipeline is unusable afterwards.
                self._pipeline, others = None, list(range(len(samples)))
        if others:
            self.fallbacks += len(others)
            part, wrong = self.twin.decode([samples[r] for r in others], geometry.select(others))
            images.index_copy_(0, _rows(others, images), part.to(self.device))
            faults = {others[row]: reason for row, reason in wrong.items()}
        return images, faults

    def _run(self, samples: Sequence[Sample], cut: Geometry, rows: list[int]) -> torch.Tensor:
        if self._pipeline is None or len(rows) > self._capacity:
            self._capacity = max(len(rows), self._capacity)
            self._pipeline = self._build(self._capacity)
        pipeline = self._pipeline
        top_left = np.stack([cut.crop_top, cut.crop_left], axis=1).astype(np.int32)
        shape = np.stack([cut.crop_height, cut.crop_width], axis=1).astype(np.int32)
        flip = cut.flip.astype(np.int32)
        pipeline.feed_input("data", [np.frombuffer(samples[row].data, np.uint8) for row in rows])
        pipeline.feed_input("anchor", [top_left[row] for row in rows])
        pipeline.feed_input("shape", [shape[row] for row in rows])
        pipeline.feed_input("flip", [flip[row] for row in rows])
        (output,) = pipeline.run()
        if self.device.type == "cpu":
            return torch.from_numpy(np.array(output.as_array()))
        return torch.from_dlpack(output.as_tensor()).clone()

    def _build(self, batch_size: int) -> Any:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        on_gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if on_gpu else None,
            # Batches are asked for one by one; the loader's own thread runs ahead.
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        with pipeline:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            image = fn.decoders.image_slice(
                data,
                anchor,
                shape,
                device="mixed" if on_gpu else "cpu",
                axes=[0, 1],
                output_type=types.RGB if self.channels == 3 else types.GRAY,
                jpeg_fancy_upsampling=True,
            )
            image = fn.resize(
                image,
                size=[self.image_size, self.image_size],
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            pipeline.set_outputs(fn.flip(image, horizontal=flip))
        pipeline.build()
        return pipeline

    def close(self) -> None:
        """Frees the pipeline and ends the threads."""
        self._pipeline = None
        self.twin.close()


def _suits(sample: Sample) -> bool:
    picture = probe(sample.data)
    return picture.plain and picture.kind in ("jpeg", "png")


def _rows(rows: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
