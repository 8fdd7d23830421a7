"""Do a generator's pictures repeat themselves? Called by telemetry.py for every round.

Three answers: exact duplicates (equal pixels), near-duplicates (root mean square difference up to a
distance, in levels of 255), and the spread, how far apart pictures of one class are, whose fall
from one set to a later one hints at mode collapse. All of it works in blocks: memory grows with the
block, not with the pool, except for eight bytes per picture.
"""

import hashlib
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .checks import thumbnails
from .pictures import Pictures, chunks


@dataclass(frozen=True)
class Duplicates:
    """How many of the new pictures repeat another one.

    Attributes:
        new, earlier: pictures looked at, and those before them that they were compared with.
        exact_within, near_within: shares of the new pictures that repeat a new picture before
            them: of two equal pictures, one counts.
        exact_earlier, near_earlier: shares that repeat an earlier picture. An exact duplicate is a
            near one too.
        distance: root mean square difference in levels of 255, up to which a picture is near.
        pairs: (new index, index of the first picture that it repeats, difference), closest first.
    """

    new: int
    earlier: int
    exact_within: float
    near_within: float
    exact_earlier: float
    near_earlier: float
    distance: float
    pairs: list[tuple[int, int, float]]

    def to_dict(self) -> dict:
        """For a report in JSON."""
        return asdict(self) | {"pairs": [list(pair) for pair in self.pairs]}


def find_duplicates(
    pictures: Pictures,
    new: np.ndarray,
    earlier: np.ndarray,
    *,
    distance: float = 2.0,
    block: int = 4096,
    shown: int = 32,
) -> Duplicates:
    """Compare pictures `new` (n,) with each other and with pictures `earlier` (m,), by index.

    Args:
        distance: root mean square difference, in levels of 255, at least 0.
        block: new pictures whose thumbnails are held at a time; `earlier` is read once for each.
        shown: pairs that are named at most.
    """
    new, earlier = np.asarray(new, np.int64), np.asarray(earlier, np.int64)
    within = _first_near(pictures, new, new, distance, block, before=True)
    outside = _first_near(pictures, new, earlier, distance, block, before=False)
    digests = _digests(pictures, new, block)
    _, first = np.unique(digests, return_index=True)
    old = _digests(pictures, earlier, block)
    pairs = [(int(new[row]), *match) for found in (outside, within) for row, match in found.items()]
    count = max(len(new), 1)
    return Duplicates(
        new=len(new),
        earlier=len(earlier),
        exact_within=(len(new) - len(first)) / count,
        near_within=len(within) / count,
        exact_earlier=int(np.isin(digests, old).sum()) / count,
        near_earlier=len(outside) / count,
        distance=distance,
        pairs=sorted(pairs, key=lambda pair: (pair[2], pair[0], pair[1]))[:shown],
    )


def spread(pictures: Pictures, indices: np.ndarray, block: int = 1024) -> float:
    """Root mean square distance between two pictures of one class, in levels of 255.

    Over all pairs of different pictures of `indices` (n,), classes with two pictures or more
    counting equally; 0 when there are none. Distances are those of thumbnails: layout and colour
    count, grain does not. Exact without visiting pairs: the mean squared distance of a class of n
    is 2 / (n - 1) times the sum of squared distances to its mean.
    """
    count: dict[int, int] = {}
    total: dict[int, torch.Tensor] = {}
    square: dict[int, float] = {}
    for part in chunks(np.asarray(indices, np.int64), block):
        small, labels = thumbnails(pictures.images(part)).double(), pictures.labels(part)
        for label in np.unique(labels).tolist():
            rows = small[torch.from_numpy(labels == label)]
            count[label] = count.get(label, 0) + len(rows)
            total[label] = total.get(label, 0.0) + rows.sum(0)
            square[label] = square.get(label, 0.0) + float(rows.square().sum())
    means = [
        2.0 * (square[label] - float(total[label].square().sum()) / n) / (n - 1)
        for label, n in count.items()
        if n > 1
    ]
    return float(np.sqrt(max(np.mean(means), 0.0))) if means else 0.0


def _first_near(
    pictures: Pictures,
    new: np.ndarray,
    others: np.ndarray,
    distance: float,
    block: int,
    *,
    before: bool,
) -> dict[int, tuple[int, float]]:
    """Place in `new` -> (index, difference) of the first of `others` within the distance.

    Args:
        before: `others` is `new` itself, and only those at a smaller place count.
    """
    found: dict[int, tuple[int, float]] = {}
    slack = 0.05 * distance**2 + 0.1  # float32 cancellation; candidates are confirmed exactly
    for start in range(0, len(new), block):
        rows = np.arange(start, min(start + block, len(new)))
        small = torch.cat([thumbnails(pictures.images(new[part])) for part in chunks(rows, 512)])
        for columns in chunks(
            np.arange(min(rows[-1], len(others)) if before else len(others)), 512
        ):
            open_rows = np.array([row for row in rows if row not in found], np.int64)
            if not len(open_rows):
                break
            images = pictures.images(others[columns])
            gaps = torch.cdist(small[torch.from_numpy(open_rows - start)], thumbnails(images))
            near = (gaps.square() <= distance**2 + slack).numpy()
            if before:
                near &= columns[None, :] < open_rows[:, None]
            _confirm(pictures, new, others, open_rows, columns, images, near, distance, found)
    return found


def _confirm(
    pictures: Pictures,
    new: np.ndarray,
    others: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    images: np.ndarray,
    near: np.ndarray,
    distance: float,
    found: dict[int, tuple[int, float]],
) -> None:
    """Check candidates `near` (rows, columns) on whole pictures, each row's first one first."""
    while (waiting := np.flatnonzero(near.any(axis=1))).size:
        first = near[waiting].argmax(axis=1)
        for part in chunks(np.arange(len(waiting)), 512):
            ours = pictures.images(new[rows[waiting[part]]]).astype(np.float32)
            gap = ours - images[first[part]]
            # Sums of squared integers: exact in float64.
            square = np.einsum("bhwc,bhwc->b", gap, gap, dtype=np.float64)
            difference = np.sqrt(square / gap[0].size)
            for place, value in zip(part, difference, strict=True):
                row, column = waiting[place], first[place]
                near[row, column] = False
                if value <= distance:
                    found[int(rows[row])] = (int(others[columns[column]]), float(value))
                    near[row] = False


def _digests(pictures: Pictures, indices: np.ndarray, block: int) -> np.ndarray:
    """64 bits of each picture's hash, (n,) uint64; a million pictures share one by chance 3e-8."""
    words = [
        int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest())
        for part in chunks(indices, min(block, 512))
        for image in pictures.images(part)
    ]
    return np.array(words, dtype=np.uint64)
