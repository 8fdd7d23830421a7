"""What a round did and what an arm reached, as numbers and a picture; called by rounds.py.

A round's report answers: did guidance raise the entropy (against the same indices drawn without
it), does the learner still agree with the labels asked for, and did pictures of earlier rounds
become easier or harder since (the paper's figure 6, hardness drift).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from etude.core.files import write_bytes_atomic, write_json_atomic
from etude.data.pool import Pool, encode_png

from .pictures import Pictures, to_model
from .scores import entropy, predict
from .supply import Supply

GALLERY_COLUMNS = 8


def report_round(
    folder: Path,
    number: int,
    learner: nn.Module,
    pool: Pool,
    ends: list[int],
    supply: Supply,
    *,
    probe: int,
    per_round: int = 1000,
    gallery: int = 32,
) -> dict:
    """Write `folder/<number>.json` and `.png` (the hardest new pictures) for a finished round.

    Args:
        number: of the round just added; 0 is the unguided start, for which nothing is guided.
        learner: frozen, as it was when it asked for the round.
        ends: pool size after each round, from round 0 to `number`.
        probe: how many of the new pictures are drawn once more without guidance.
        per_round: pictures of each earlier round whose error is measured, evenly spaced.

    Returns:
        What was written: entropies in nats, shares in [0, 1].
    """
    new = np.arange(ends[number - 1], ends[number])
    logits, labels = predict(learner, pool, new)
    hardness = entropy(logits)
    twins = new[: min(probe, len(new))]
    report = {
        "round": number,
        "samples": ends[number],
        "entropy": float(hardness.mean()),
        "agreement": float((logits.argmax(-1) == labels).float().mean()),
        "error_by_round": errors_by_round(learner, pool, ends, per_round),
    }
    if len(twins):
        plain = _logits(learner, supply.draw(twins, None)[0])
        report |= {
            "probe": len(twins),
            "probe_entropy_unguided": float(entropy(plain).mean()),
            "probe_entropy_guided": float(hardness[: len(twins)].mean()),
            "probe_agreement_unguided": float(
                (plain.argmax(-1) == labels[: len(twins)]).float().mean()
            ),
        }
    hardest = hardness.argsort(descending=True)[:gallery].numpy()
    report["hardest"] = [
        {
            "index": int(new[i]),
            "label": int(labels[i]),
            "taken_for": int(logits[i].argmax()),
            "entropy": float(hardness[i]),
        }
        for i in hardest
    ]
    write_png(folder / f"{number:03d}.png", pool.images(new[hardest]))
    write_json_atomic(folder / f"{number:03d}.json", report)
    return report


def errors_by_round(
    learner: nn.Module, pool: Pictures, ends: list[int], per_round: int
) -> list[float]:
    """Share of each round's pictures that the learner labels otherwise than asked."""
    errors = []
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        chosen = np.unique(np.linspace(first, end - 1, min(per_round, end - first)).astype(int))
        logits, labels = predict(learner, pool, chosen)
        errors.append(float((logits.argmax(-1) != labels).float().mean()))
    return errors


def write_png(path: Path, images: np.ndarray, columns: int = GALLERY_COLUMNS) -> None:
    """Pictures (n, S, S, C) uint8 as one PNG grid, row by row, with a pixel between them."""
    count, size, _, channels = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * (size + 1) + 1, columns * (size + 1) + 1, channels), np.uint8)
    for place, image in enumerate(images):
        top, left = (size + 1) * (place // columns) + 1, (size + 1) * (place % columns) + 1
        sheet[top : top + size, left : left + size] = image
    write_bytes_atomic(path, encode_png(sheet))


@torch.no_grad()
def _logits(learner: nn.Module, images: np.ndarray) -> Tensor:
    device = next(learner.parameters()).device
    return learner(to_model(images, device)).float().cpu()
