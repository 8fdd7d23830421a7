"""How far a picture moves when only its control is changed: `python -m benchmarks.control_moves`.

Runs the study `studies/control_digits`, or another one of its form that is named behind the
command (finished jobs are kept), draws the same pictures (noise and label) of every run under the
control of a whole picture and under those of five cuts, appends one row to
results/control_moves.jsonl and writes docs/control-moves.png.

The content has moved where no cut explains the difference. With b a picture drawn as whole, m the
same one drawn under an asked cut, and C_w b the window w of b brought to the full size,

    change       LPIPS(b, m)            everything that moved, the geometry too
    as asked     LPIPS(C_asked b, m)    0 if the control did what it says and nothing else
    content      LPIPS(C_w b, m)        at the w of least squared error: what no cut explains
    obedience    slope of that w on the asked one (place of the centre, and side): 1 where the
                 picture was cut as asked, 0 where the control was ignored
    same label   the judge says the same of C_w b and of m

A control that is ignored has content 0 as well, so content counts only beside obedience. Real
digits, cut as in training and sent through the autoencoder, say what a perfect generator would get;
another real digit of the same class says what a picture with nothing but its label kept would get.
LPIPS is that of AlexNet, on pictures enlarged from 16 to 64 pixels, which it was not made for.
Intervals cover repeated draws of pictures and of training seeds.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etude.core.recipe import fingerprint, load_recipe
from etude.data.augment import Geometry
from etude.data.decode_torch import Decoder, to_signed
from etude.data.shards import ShardSet
from etude.evaluation.judge import open_judge
from etude.external.diffusers import Autoencoder
from etude.jobs import run_recipe
from etude.models.lpips import LPIPS
from etude.practice.paired import Interval, paired_interval
from etude.sampling import Generator, balanced_labels, open_autoencoder, open_generator, to_uint8

from .case import ROOT
from .results import append, machine

STUDY = "studies/control_digits"
LPIPS_WEIGHTS = Path("data/lpips/alexnet.safetensors")
PICTURES, SEED = 64, 1  # of each run; the seed of the pictures' noise
FIGURE = ROOT / "docs" / "control-moves.png"
TEST = "data/digits/test"  # real pictures that no model was trained on
SIDE = 16  # of the pictures that are drawn, in pixels
STORED = 8  # side of a stored digit, in pixels: the unit of every window here
SEEN_AT = 64  # side that LPIPS looks at
WHOLE = (0, 0, STORED)
# (top, left, side) of cuts that training has as well
CUTS = ((0, 0, 6), (0, 2, 6), (2, 0, 6), (2, 2, 6), (1, 1, 6))
RANGE = 4.0  # no slope, and no difference of two, is larger
SHOWN = (2, 3)  # the pictures of the figure; the asked labels are the same
PAIRS = (  # arms that are compared, where the study has them
    ("phased", "summed"),
    ("late", "summed"),
    ("concatenated", "summed"),
    ("separated", "attended"),
    ("micro", "attended"),
    ("attended", "summed"),
    ("separated", "phased"),
    ("separated", "summed"),
)

Window = tuple[float, float, float]
Labels = Callable[[np.ndarray], np.ndarray]


def candidates() -> list[Window]:
    """Windows that a picture is compared with, half a pixel apart, the whole one first."""
    middle, moves = STORED / 2, np.arange(-2.0, 2.01, 0.5)
    found = [
        (middle + down - side / 2, middle + right - side / 2, side)
        for side in np.arange(STORED - 3, STORED + 1.01, 0.5)
        for down in moves
        for right in moves
    ]
    return sorted(found, key=lambda w: float(np.abs(np.subtract(w, WHOLE)).sum()))


def cut(images: Tensor, windows: list[Window]) -> Tensor:
    """Windows of pictures at the pictures' own size, bicubic, the edge repeated beyond it.

    Args:
        images: (N, C, S, S) float.
        windows: W of (top, left, side), in units of `STORED` to a side.

    Returns:
        (N, W, C, S, S).
    """
    count, channels, size, _ = images.shape
    middles = (torch.arange(size, dtype=images.dtype) + 0.5) / size  # of the pixels, in [0, 1]
    corners = torch.tensor(windows, dtype=images.dtype) / STORED
    y, x = (2 * (corners[:, k, None] + corners[:, 2, None] * middles) - 1 for k in (0, 1))
    grid = torch.stack((x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)), -1)
    grid = grid.reshape(1, -1, size, 2).expand(count, -1, -1, -1)
    found = F.grid_sample(images, grid, "bicubic", "border", align_corners=False)
    return found.view(count, channels, len(windows), size, size).transpose(1, 2)


def fitted(base: Tensor, moved: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
    """The window of each picture that explains each moved one best, by squared error.

    Args:
        base: (N, C, S, S) in [0, 1].
        moved: (K, N, C, S, S) in [0, 1].

    Returns:
        The windows (K, N, 3), and the pictures cut there (K, N, C, S, S).
    """
    windows = candidates()
    chosen, pictures = [], []
    for some, theirs in zip(base.split(batch), moved.split(batch, dim=1), strict=True):
        cuts = cut(some, windows)
        rows = torch.arange(len(some))
        best = [(cuts - one[:, None]).square().sum((2, 3, 4)).argmin(1) for one in theirs]
        chosen.append(torch.stack(best))
        pictures.append(torch.stack([cuts[rows, w] for w in best]))
    return torch.tensor(windows)[torch.cat(chosen, 1)], torch.cat(pictures, 1)


def obedience(found: Tensor, asked: list[Window]) -> tuple[Tensor, Tensor]:
    """Slopes (N,) of the found windows (K, N, 3) on the K asked ones: of the centre, of the side.

    Both are counted from the whole picture and go through zero.
    """
    goal = torch.tensor(asked, dtype=found.dtype)
    slopes = []
    for part in (_centre, _side):
        have, want = part(found), part(goal)[:, None]
        slopes.append((have * want).sum((0, 2)) / want.square().sum())
    return slopes[0], slopes[1]


def _centre(windows: Tensor) -> Tensor:
    return windows[..., :2] + windows[..., 2:] / 2 - STORED / 2


def _side(windows: Tensor) -> Tensor:
    return windows[..., 2:] - STORED


def moves(
    base: np.ndarray, moved: np.ndarray, asked: list[Window], judge: Labels, distance: LPIPS
) -> dict[str, np.ndarray]:
    """The measures of the file's docstring for each picture, averaged over the cuts.

    Args:
        base: (N, S, S, C) uint8, drawn as whole.
        moved: (K, N, S, S, C) uint8, the same drawn under each of `asked`.
        judge: pictures (n, S, S, C) uint8 to labels (n,).

    Returns:
        (N,) float64 by name: change, as_asked, content, place, side, same_label.
    """
    whole, others = _unit(base), torch.stack([_unit(pictures) for pictures in moved])
    windows, explained = fitted(whole, others)
    place, side = obedience(windows, asked)
    as_asked = cut(whole, asked).transpose(0, 1)
    pairs = {"change": whole.expand_as(others), "as_asked": as_asked, "content": explained}
    found = {"place": place, "side": side}
    for name, pictures in pairs.items():
        found[name] = torch.stack(
            [_seen(distance, a, b) for a, b in zip(pictures, others, strict=True)]
        ).mean(0)
    same = [judge(_bytes(a)) == judge(b) for a, b in zip(explained, moved, strict=True)]
    return {n: v.double().numpy() for n, v in found.items()} | {"same_label": np.mean(same, 0)}


def _unit(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 to (N, C, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def _bytes(images: Tensor) -> np.ndarray:
    return to_uint8(images * 2 - 1)


def _seen(distance: LPIPS, a: Tensor, b: Tensor) -> Tensor:
    sides = [F.interpolate(x.clamp(0, 1), size=SEEN_AT, mode="bicubic") * 2 - 1 for x in (a, b)]
    with torch.no_grad():
        return distance(*sides)


def drawn(
    generator: Generator, asked: list[Window], count: int = PICTURES, folder: Path | None = None
) -> np.ndarray:
    """The same pictures under the control of each window: (K, count, H, W, C) uint8.

    A model without control has the same pictures for all. `folder` keeps them for the next call.
    """
    about = json.dumps([generator.protocol, list(asked), count, SEED], sort_keys=True)
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    kept = folder / f"control-{key}.npy" if folder else None
    if kept and kept.exists():
        return np.load(kept)
    indices = np.arange(count)
    labels = balanced_labels(indices, generator.num_classes)
    names = [entry.name for entry in generator.conditions.config.control]
    found: list[np.ndarray] = []
    for top, left, side in asked if names else asked[:1]:
        values = {"crop_top": top, "crop_left": left, "crop_height": side}
        control = {name: float(values[name]) for name in names}
        one = dataclasses.replace(generator, control=control)
        found.append(one.draw(indices, labels, seed=SEED)[0])
    pictures = np.stack(found if names else found * len(asked))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, pictures)
    return pictures


def real(
    autoencoder: Autoencoder, shards: str, asked: list[Window]
) -> tuple[np.ndarray, np.ndarray]:
    """The first `PICTURES` stored pictures, cut as training does, through the autoencoder.

    Returns:
        Labels (N,), and pictures (K, N, SIDE, SIDE, 1) uint8, of each of `asked`.
    """
    data = ShardSet(shards)
    samples = [data[i] for i in range(min(PICTURES, len(data)))]
    decoder, found = Decoder(SIDE, 1), []
    for top, left, size in asked:
        rows = [np.full(len(samples), n, np.int64) for n in (top, left, size, size, 0, STORED)]
        cuts = Geometry(*rows[:4], rows[4].astype(bool), rows[5], rows[5])
        with torch.no_grad():
            posterior, _ = autoencoder.encode(to_signed(decoder.decode(samples, cuts)[0]))
            found.append(to_uint8(autoencoder.decode(posterior)))
    decoder.close()
    return np.array([sample.label for sample in samples]), np.stack(found)


def mean(values: np.ndarray, low: float = -RANGE, high: float = RANGE) -> Interval:
    """Of (seeds, pictures), with an interval over both; of one row over its pictures alone.

    Args:
        low, high: what a mean can be; the interval ends there.
    """
    values = np.atleast_2d(values)
    if len(values) > 1:
        found = paired_interval(values / RANGE, np.zeros_like(values))
        middle, least, most = (RANGE * v for v in (found.value, found.low, found.high))
    else:
        middle, half = values.mean(), 1.96 * values.std(ddof=1) / np.sqrt(values.size)
        least, most = middle - half, middle + half
    return Interval(float(middle), max(low, float(least)), min(high, float(most)))


def limits(measure: str) -> tuple[float, float]:
    """What a mean of a measure can be."""
    return (0.0, 1.0) if measure.endswith("_label") else (-RANGE, RANGE)


def rounded(interval: Interval) -> list[float]:
    """[value, low, high]."""
    return [round(v, 4) for v in (interval.value, interval.low, interval.high)]


def measured(
    pictures: np.ndarray, labels: np.ndarray, judge: Labels, distance: LPIPS
) -> dict[str, np.ndarray]:
    """What `moves` returns for pictures (1 + K, N, S, S, C), the whole ones and those of `CUTS`.

    And whether the judge says the asked label: of the whole one (`whole_label`), and as a share of
    the cuts (`asked_label`).
    """
    right = np.stack([judge(some) == labels for some in pictures]).astype(np.float64)
    found = moves(pictures[0], pictures[1:], list(CUTS), judge, distance)
    return found | {"asked_label": right[1:].mean(0), "whole_label": right[0]}


def references(
    autoencoder: Autoencoder, shards: str, judge: Labels, distance: LPIPS
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What real digits get, by name: cut themselves, or another of their class instead.

    And of the first ones, the pictures that the figure shows.
    """
    labels, pictures = real(autoencoder, shards, [WHOLE, *CUTS])
    following = np.arange(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        following[rows] = np.roll(rows, -1)
    another = np.concatenate([pictures[:1], pictures[1:, following]])
    found = {"real digit": pictures, "another real digit": another}
    shown = pictures[:, [int(np.argmax(labels == label)) for label in SHOWN]]
    values = {name: measured(some, labels, judge, distance) for name, some in found.items()}
    return values, {"real digit": shown}


def figure(
    pictures: dict[str, np.ndarray], values: dict[str, dict[str, np.ndarray]], path: Path
) -> None:
    """A row per arm, the control along the columns; and content over obedience, a point a seed.

    Args:
        pictures: (1 + K, 2, H, W, 1) uint8 by arm.
        values: (seeds, N) by arm and measure.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    drawing, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.2), width_ratios=[2.1, 1], layout="constrained"
    )
    columns = len(CUTS) + 1
    rows = [np.concatenate(p.transpose(1, 0, 2, 3, 4)).squeeze(-1) for p in pictures.values()]
    tall, wide = rows[0].shape[1:]
    sheet = np.full((len(rows) * (tall + 2), 2 * columns * (wide + 1) + 6), 255, np.uint8)
    starts = [n * (wide + 1) + (6 if n >= columns else 0) for n in range(2 * columns)]
    for n, row in enumerate(rows):
        for start, picture in zip(starts, row, strict=True):
            sheet[n * (tall + 2) : n * (tall + 2) + tall, start : start + wide] = picture
    left.imshow(sheet, cmap="gray", interpolation="nearest", vmin=0, vmax=255)
    names = [f"{side}: {top}, {left_}" for top, left_, side in (WHOLE, *CUTS)]
    left.set_xticks([s + wide / 2 for s in starts], names * 2, rotation=60, fontsize=6)
    left.set_yticks([n * (tall + 2) + tall / 2 for n in range(len(rows))], list(pictures))
    left.set_title("side: top, left of the cut that is asked for, in stored pixels", fontsize=9)
    left.spines[:].set_visible(False)
    for name, found in values.items():
        obeyed = (found["place"] + found["side"]) / 2
        right.plot(obeyed.mean(1), found["content"].mean(1), "o", ms=5, label=name)
    right.set(xlabel="obedience (1: cut as asked)", ylabel="content moved (LPIPS, no cut explains)")
    right.set(xlim=(-0.05, 1.1), ylim=(0, None))
    right.grid(lw=0.3)
    right.legend(fontsize=7)
    drawing.savefig(path, dpi=110, metadata={"Software": None})


def table(row: dict) -> list[str]:
    """The row's arms and differences as Markdown: each value with its interval."""
    measures = {
        "place": "place obeyed",
        "side": "size obeyed",
        "change": "change",
        "as_asked": "as asked",
        "content": "content",
        "same_label": "same label",
        "asked_label": "asked label",
        "whole_label": "asked label, whole",
    }
    lines = ["| | " + " | ".join(measures.values()) + " |", "|" + "---|" * (len(measures) + 1)]
    for name, by in (row["arms"] | row["differences"]).items():
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*by[m]) for m in measures]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str]) -> None:
    named = arguments[0] if arguments else STUDY
    study = load_recipe(named)
    _, result = run_recipe(study)
    if "stopped" in result:
        return
    arms = [name for name, job in study.jobs.items() if job.recipe.startswith("ldm/")]
    runs = {
        arm: [Path(f) for label, f in result["runs"].items() if label.split("[")[0] == arm]
        for arm in arms
    }
    judge = open_judge(result["runs"]["judge"])
    distance = LPIPS.from_file(LPIPS_WEIGHTS)
    autoencoder, _ = open_autoencoder(result["runs"]["autoencoder"])

    found, shown = references(autoencoder, TEST, judge, distance)
    values = {name: {m: v[None] for m, v in by.items()} for name, by in found.items()}
    labels = balanced_labels(np.arange(PICTURES), 10)
    for arm in arms:
        seeds = []
        for run in runs[arm]:
            pictures = drawn(open_generator(run), [WHOLE, *CUTS], folder=run / "samples")
            seeds.append(measured(pictures, labels, judge, distance))
            shown.setdefault(arm, pictures[:, list(SHOWN)])
            print(arm, run.name, {m: round(float(v.mean()), 3) for m, v in seeds[-1].items()})
        values[arm] = {m: np.stack([one[m] for one in seeds]) for m in seeds[0]}

    row = {
        "study": named,
        "fingerprint": fingerprint(study),
        "seeds": {arm: len(runs[arm]) for arm in arms},
        "pictures": PICTURES,
        "cuts": CUTS,
        "lpips": {"network": distance.network, "sha256": distance.weights_sha256, "side": SEEN_AT},
        "arms": {
            arm: {m: rounded(mean(v, *limits(m))) for m, v in by.items()}
            for arm, by in values.items()
        },
        "by_seed": {
            arm: {m: np.round(by[m].mean(1), 4).tolist() for m in by} for arm, by in values.items()
        },
        "differences": {
            f"{a} - {b}": {m: rounded(mean(values[a][m] - values[b][m])) for m in values[a]}
            for a, b in PAIRS
            if a in values and b in values
        },
    } | machine()
    append("control_moves", [row])
    figure(shown, values, FIGURE)
    print("\n".join(table(row)))


if __name__ == "__main__":
    main(sys.argv[1:])
