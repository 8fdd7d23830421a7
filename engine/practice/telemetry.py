"""What a round did, as numbers and a picture; called by course.py once a round is whole.

A round's report answers: did guidance raise the entropy (against the same indices drawn without
it), does the learner still agree with the labels asked for and how many labels are wrong by now
(flips.py), do pictures repeat themselves or each other's layout (duplicates.py), and did pictures
of earlier rounds become easier or harder since (the paper's figure 6, hardness drift).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from etude.core.files import write_bytes_atomic, write_json_atomic
from etude.data.pool_parts import encode_png

from .duplicates import find_duplicates, spread
from .flips import Judge, judged_flips, suspected_flips
from .pictures import Pictures, Stored
from .scores import entropy, predict

GALLERY_COLUMNS = 8
HISTOGRAM_BINS = 20


def report_round(
    folder: Path,
    number: int,
    learner: nn.Module,
    pool: Pictures,
    ends: list[int],
    twins: tuple[np.ndarray, np.ndarray] | None = None,
    judge: Judge | None = None,
    *,
    per_round: int = 1000,
    gallery: int = 32,
    distance: float = 2.0,
    compared: int = 20_000,
) -> dict:
    """Write `folder/<number>.json` and `.png` (the hardest new pictures) for a finished round.

    Args:
        number: of the round just added; 0 is the start, which nothing has guided.
        learner: frozen, as it was when it asked for the round.
        ends: pool size after each round, from round 0 to `number`.
        twins: pool indices (n,) int64 of some of the new pictures, and the same indices drawn
            without guidance, (n, S, S, C) uint8; None leaves the comparison out.
        judge: trained on real pictures; None leaves the flips to the learner's suspicion.
        per_round: pictures of each earlier round whose error is measured, evenly spaced.
        distance: root mean square difference, in levels of 255, of near-duplicates.
        compared: new pictures, and as many earlier ones, that duplicates are looked for among,
            evenly spaced; where a round or the pool is larger, the shares are lower bounds.

    Returns:
        What was written: entropies in nats, shares in [0, 1], distances in levels of 255.
    """
    first = ends[number - 1] if number else 0
    new = np.arange(first, ends[number])
    logits, labels = predict(learner, pool, new)
    start = np.arange(ends[0])
    report = {
        "round": number,
        "samples": ends[number],
        **guidance_effect(logits, labels, new, *_unguided(learner, twins)),
        "error_by_round": errors_by_round(learner, pool, ends, per_round),
        "flips": flips_of(pool, new, logits, labels, judge),
        "duplicates": find_duplicates(
            pool, _spaced(new, compared), _spaced(np.arange(first), compared), distance=distance
        ).to_dict(),
        "spread": {
            "new": spread(pool, _spaced(new, compared)),
            "start": spread(pool, _spaced(start, compared)),
        },
    }
    order = entropy(logits).argsort(descending=True)[:gallery].numpy()
    report["hardest"] = hardest(new, logits, labels, order)
    write_png(folder / f"{number:03d}.png", pool.images(new[order]))
    write_json_atomic(folder / f"{number:03d}.json", report)
    return report


def guidance_effect(
    logits: Tensor,
    labels: Tensor,
    indices: np.ndarray,
    twins: np.ndarray | None = None,
    plain: Tensor | None = None,
) -> dict:
    """Entropy and agreement of new pictures, and of some of them beside their unguided twins.

    Args:
        logits: (n, K), of the new pictures.
        labels: (n,) int64, the classes asked for.
        indices: (n,) int64, ascending, the new pictures' pool indices.
        twins: (m,) int64, some of `indices`.
        plain: (m, K), logits of the same indices drawn without guidance.

    Returns:
        `entropy`, `entropy_histogram`, `agreement`, and with twins `probe` (m) and
        `probe_entropy_guided`, `probe_entropy_unguided`, `probe_raised` (share of pictures whose
        entropy is above its twin's), `probe_agreement_guided`, `probe_agreement_unguided` and
        `probe_histogram_unguided`.
    """
    hardness, classes = entropy(logits), logits.shape[-1]
    report = {
        "entropy": float(hardness.mean()),
        "entropy_histogram": histogram(hardness, classes),
        "agreement": _agreement(logits, labels),
    }
    if twins is None or plain is None or not len(twins):
        return report
    place = torch.from_numpy(np.searchsorted(indices, twins))
    guided, unguided = hardness[place], entropy(plain)
    return report | {
        "probe": len(twins),
        "probe_entropy_guided": float(guided.mean()),
        "probe_entropy_unguided": float(unguided.mean()),
        "probe_raised": float((guided > unguided).float().mean()),
        "probe_agreement_guided": _agreement(logits[place], labels[place]),
        "probe_agreement_unguided": _agreement(plain, labels[place]),
        "probe_histogram_unguided": histogram(unguided, classes),
    }


def histogram(entropies: Tensor, classes: int, bins: int = HISTOGRAM_BINS) -> list[int]:
    """Pictures in each of `bins` equal parts of [0, log classes] nats, the last one closed.

    Rounding can lift a uniform distribution's entropy above log classes; it counts as the last.
    """
    share = entropies.double().numpy() / np.log(classes)
    place = np.clip((share * bins).astype(np.int64), 0, bins - 1)
    return np.bincount(place, minlength=bins).tolist()


def flips_of(
    pictures: Pictures, indices: np.ndarray, logits: Tensor, labels: Tensor, judge: Judge | None
) -> dict:
    """Share of pictures that show another class than asked: the judge's, or the learner's guess.

    Args:
        logits: (n, K), the learner's; not read where a judge is given.
    """
    if judge is None:
        return suspected_flips(logits, labels).to_dict()
    judged, _ = predict(judge.model, pictures, indices)
    return judged_flips(judge, judged.argmax(-1).numpy(), labels.numpy()).to_dict()


def errors_by_round(
    learner: nn.Module, pool: Pictures, ends: list[int], per_round: int
) -> list[float]:
    """Share of each round's pictures that the learner labels otherwise than asked."""
    errors = []
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        logits, labels = predict(learner, pool, _spaced(np.arange(first, end), per_round))
        errors.append(1.0 - _agreement(logits, labels))
    return errors


def hardest(indices: np.ndarray, logits: Tensor, labels: Tensor, order: np.ndarray) -> list[dict]:
    """What a gallery shows: index, label, the class it was taken for and the entropy in nats."""
    values = entropy(logits)
    return [
        {
            "index": int(indices[i]),
            "label": int(labels[i]),
            "taken_for": int(logits[i].argmax()),
            "entropy": float(values[i]),
        }
        for i in order
    ]


def write_png(path: Path, images: np.ndarray, columns: int = GALLERY_COLUMNS) -> None:
    """Pictures (n, S, S, C) uint8 as one PNG grid, row by row, with a pixel between them."""
    count, size, _, channels = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * (size + 1) + 1, columns * (size + 1) + 1, channels), np.uint8)
    for place, image in enumerate(images):
        top, left = (size + 1) * (place // columns) + 1, (size + 1) * (place % columns) + 1
        sheet[top : top + size, left : left + size] = image
    write_bytes_atomic(path, encode_png(sheet))


def _unguided(
    learner: nn.Module, twins: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray | None, Tensor | None]:
    """The twins' indices and the learner's logits of them."""
    if twins is None or not len(twins[0]):
        return None, None
    indices, images = twins
    unlabelled = np.zeros(len(images), np.int64)
    return indices, predict(learner, Stored(images, unlabelled, []))[0]


def _agreement(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


def _spaced(indices: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the indices, evenly spaced."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).astype(np.int64)]
