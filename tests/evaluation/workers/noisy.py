"""A generator for plans of the tests, which name this file: held-out digits of the asked class,
8 x 8 and grey, with Philox noise of the picture's position. Its source is FOLDER:NOISE."""

import numpy as np

from etude.core.rng import Stream, normal
from etude.evaluation.generators import generator
from etude.evaluation.sets import ShardPictures, Stages


class Noisy:
    asked_by_text, classes = False, [str(n) for n in range(10)]
    protocol = {"sampler": {"method": "none"}, "rounding": "down"}

    def __init__(self, wanted):
        folder, _, noise = wanted.source.partition(":")
        self.noise = float(noise) * (wanted.guidance or 1.0)
        self.name, self.fingerprint = f"noise {self.noise:g}", f"noise {self.noise!r}"
        shards = ShardPictures(folder, size=8, channels=1)
        self.pictures = shards.read(0, len(shards), Stages())

    def draw(self, indices, labels, *, seed, captions, positions):
        noise = normal(seed, Stream.SAMPLE_NOISE, positions, (8, 8, 1)).numpy() * self.noise
        found = []
        for index, label, more in zip(indices, labels, noise, strict=True):
            rows = np.flatnonzero(self.pictures.labels == label)
            image = self.pictures.images[rows[(index // 10) % len(rows)]]
            found.append(np.clip(image + more, 0, 255).astype(np.uint8))
        return np.stack(found)


@generator("noisy")
def noisy(wanted):
    return Noisy(wanted)
