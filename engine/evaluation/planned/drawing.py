"""Drawn pictures of a data set's prompts, kept in the plan's run; called by running.py.

Picture i is of prompt i mod P in its (i div P)-th repetition. A plan mixes the prompts of a data
set first (`mixed`), in whose own order classes or regions lie together, so that any first n
pictures are spread evenly over them. A picture's noise is a function of (seed, the prompt's id,
repetition): another order or choice of prompts, or number of pictures, jobs or processes, changes
no picture beyond the rounding of a matrix product. Pictures are drawn in whole blocks of
consecutive numbers, a file a block, whoever draws them; a killed job goes on with the first block
that is missing.
"""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from etude.core.distributed import FOREVER_S, World, exchange
from etude.core.errors import UserError
from etude.core.files import write_bytes_atomic, write_json_atomic
from etude.core.log import Log
from etude.core.signals import StopRequested

from ..datasets import Prompt, Prompts
from ..decoding import Form
from ..extract import ended
from ..generators import DrawsPictures
from ..picture_set import Pictures, Stages, class_numbers, digest, spread_order, stacked

AS_DRAWN = Form(channels=0)
BLOCK = 64  # pictures of a file; the sampler's own block
PLACES = 1 << 39  # positions that the sampler has room for


class DrawnPictures:
    """The first `count` pictures that a generator draws of prompts; a `PictureSet`.

    Args:
        prompts: what is asked for; a generator asked by class takes their labels.
        folder: where blocks lie; one folder holds the pictures of many generators.
        form: what brings pictures to the size of the real ones; by default they stay as drawn.
    """

    def __init__(
        self,
        generator: DrawsPictures,
        prompts: Prompts,
        count: int,
        *,
        seed: int,
        folder: Path,
        form: Form = AS_DRAWN,
    ) -> None:
        if not generator.asked_by_text and any(p.label < 0 for p in prompts.prompts):
            raise UserError(
                f"{generator.name} is asked by class and the prompts of {prompts.name} have none;"
                " name a data set with classes"
            )
        if generator.asked_by_text and not all(p.text for p in prompts.prompts):
            raise UserError(
                f"{generator.name} is asked by text and prompts of {prompts.name} have none; name"
                " a data set with captions"
            )
        theirs = () if generator.asked_by_text else generator.classes
        self._numbers = class_numbers(theirs, prompts.classes, generator.name, prompts.name)
        self.generator, self.prompts, self.seed = generator, prompts, seed
        self.name, self.classes, self._count = generator.name, list(prompts.classes), count
        self.protocol: dict[str, Any] = dict(generator.protocol) | {
            "seed": seed,
            "prompts": prompts.fingerprint,
        }
        parts = [generator.fingerprint, self.protocol]
        parts += [self._numbers] if self._numbers != sorted(self._numbers) else []
        identity = json.dumps(parts, sort_keys=True)
        self.drawing = hashlib.sha256(identity.encode()).hexdigest()
        self._form = form
        self.protocol |= form.protocol
        self.fingerprint = digest(["drawn", self.drawing, count, form.parts])
        self.folder = Path(folder) / self.drawing[:16]

    def __len__(self) -> int:
        return self._count

    def missing(self) -> list[int]:
        """First numbers of the blocks that are not there yet."""
        starts = range(0, self._count, BLOCK)
        return [start for start in starts if not self._block(start).exists()]

    def draw(self, log: Log, world: World | None = None) -> int:
        """Draw what is missing, every process the next block of each round.

        Returns:
            Pictures drawn, by all processes together.

        Raises:
            StopRequested: one of the processes was asked to stop; whole blocks are kept.
            UserError: on every process, what was wrong on one.
        """
        rank, size = (world.rank, world.size) if world else (0, 1)
        if rank == 0:
            about = {"generator": self.generator.name} | self.protocol
            write_json_atomic(self.folder / "protocol.json", about)
        starts = self.missing() if rank == 0 else []
        if world is not None:  # a network file system may show another process less
            starts = exchange(world, "what is not drawn yet", starts, FOREVER_S)[0]
        total = sum(self._size(start) for start in starts)
        with log.progress(f"drawing {self.name}", total, unit="pictures") as progress:
            for turn in range(0, len(starts), size):
                trouble: StopRequested | UserError | None = None
                try:
                    if turn + rank < len(starts):
                        self._draw_block(starts[turn + rank])
                    progress.advance(sum(self._size(s) for s in starts[turn : turn + size]))
                except (StopRequested, UserError) as error:
                    trouble = error
                ended(world, "a block of drawn pictures", trouble, log)
        return total

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop, which must have been drawn."""
        with stages("read"):
            parts = []
            for first in range(start // BLOCK * BLOCK, stop, BLOCK):
                block = np.load(self._block(first), mmap_mode="r")
                parts.append(block[max(start - first, 0) : stop - first])
            images = stacked([self._form.array(image) for image in np.concatenate(parts)])
        asked = self.asked(start, stop)
        labels = np.array([prompt.label for prompt in asked], np.int64)
        keys = [
            f"{self.seed}/{prompt.id}/{index // len(self.prompts)}"
            for index, prompt in zip(range(start, stop), asked, strict=True)
        ]
        return Pictures(images, keys, labels, [prompt.group for prompt in asked])

    def asked(self, start: int, stop: int) -> list[Prompt]:
        """The prompts of pictures start to stop."""
        return [self.prompts.prompts[index % len(self.prompts)] for index in range(start, stop)]

    def _number(self, label: int) -> int:
        """The generator's number of a class of the data set."""
        return self._numbers[label] if self._numbers else label

    def _size(self, start: int) -> int:
        return min(BLOCK, self._count - start)

    def _block(self, start: int) -> Path:
        return self.folder / f"{start:09d}.npy"

    def _draw_block(self, start: int) -> None:
        # Always whole, whatever the count is: a larger count goes on where a smaller one ended.
        indices = np.arange(start, start + BLOCK, dtype=np.int64)
        asked = self.asked(start, start + BLOCK)
        places = [
            noise_position(prompt.id, index // len(self.prompts))
            for prompt, index in zip(asked, indices.tolist(), strict=True)
        ]
        drawn = self.generator.draw(
            indices,
            np.array([self._number(prompt.label) for prompt in asked], np.int64),
            seed=self.seed,
            captions=[prompt.text for prompt in asked] if self.generator.asked_by_text else None,
            positions=np.array(places, np.int64),
        )
        images = np.asarray(drawn[0] if isinstance(drawn, tuple) else drawn)
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != BLOCK:
            raise UserError(
                f"{self.name} drew {images.dtype} {images.shape} for {BLOCK} pictures: a generator"
                " gives uint8 (n, height, width, channels)"
            )
        stream = io.BytesIO()
        np.save(stream, images)
        write_bytes_atomic(self._block(start), stream.getvalue())


def noise_position(prompt_id: str, repetition: int) -> int:
    """Where the noise of a prompt's repetition lies in the sampler's stream, in [0, 2^39).

    A hash; of 50,000 prompts two share their noise with probability 0.002, which harms nothing, as
    they ask for different things.
    """
    digest = hashlib.sha256(prompt_id.encode()).digest()
    return (int.from_bytes(digest[:8], "big") + repetition) % PLACES


def mixed(prompts: Prompts, limit: int = 0) -> Prompts:
    """The prompts in random order, spread over classes and groups; the first `limit`, 0: all."""
    order = spread_order([(prompt.label, prompt.group) for prompt in prompts.prompts])
    chosen = tuple(prompts.prompts[place] for place in order[: limit or None])
    return replace(prompts, prompts=chosen)


def class_prompts(name: str, classes: list[str]) -> Prompts:
    """Prompts of a data set that has classes and no prompts: one a class, asked by its name."""
    return Prompts(
        name,
        tuple(Prompt(f"class {n}", text, label=n) for n, text in enumerate(classes)),
        tuple(classes),
    )
