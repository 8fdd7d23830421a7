"""Your own pictures in one command: `etude start FOLDER`.

Reads the folder (gathering.py), splits it by content so that near-duplicates stay on one side,
writes checked shards, a contact sheet and two commented recipes sized to this machine below
`data/NAME`, and prints the commands that come next. Pictures with captions and no classes are
asked by text, others by class. Called by the command line.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from etude.core.errors import UserError
from etude.core.log import Log
from etude.data.files import new_folder
from etude.data.picture import probe
from etude.data.shards import ShardSet, write_shards

from .gathering import Found, Gathered, gather, groups
from .pictures import picture_grid, png
from .starting_recipes import ENCODER, Machine, Pictures, autoencoder_recipe, latent_recipe

FEW_PICTURES = 2000
NAMED_BAD = 20  # unreadable pictures named in the terminal; start.json names all
RECORD = "start.json"
SHEET_PICTURES, SHEET_SIDE = 64, 96


@dataclass(frozen=True)
class Started:
    """What `start` wrote.

    Attributes:
        folder: `data/NAME`, with `train/` and `test/` shards, `contact.png` and `start.json`.
        autoencoder, latent: the two recipes.
        counts: pictures in (train, test).
        commands: what to type next.
    """

    folder: Path
    autoencoder: Path
    latent: Path
    counts: tuple[int, int]
    commands: list[str]


def start(
    folder: Path | str,
    *,
    name: str = "",
    out: Path | str = "data",
    image_size: int | None = None,
    held_out: float = 0.1,
    log: Log | None = None,
) -> Started:
    """Make a folder of pictures ready to train on.

    Args:
        folder: class subfolders, pictures with captions (`.txt` beside or one CSV), or neither.
        name: of the data set; the folder's name by default.
        out: where the data set is written, as `out/name`.
        image_size: 32, 64 or 256 pixels; by default what suits the pictures and this machine.
        held_out: share of the groups of near-duplicates that is never trained on.

    Raises:
        UserError: nothing usable in the folder, or `out/name` holds something else. The same
            pictures again are found ready.
    """
    log, folder = log or Log(None), Path(folder)
    name = _data_name(name or folder.resolve().name)
    target = Path(out) / name
    if target.exists() and target.resolve() in (folder.resolve(), *folder.resolve().parents):
        name, target = f"{name}-shards", Path(out) / f"{name}-shards"
    gathered = gather(folder, log)
    together = groups(gathered.pictures)
    _report(gathered, together, log)
    machine = Machine.this()
    size = image_size or machine.image_size([min(p.width, p.height) for p in gathered.pictures])
    if size not in (32, 64, 256):
        raise UserError(f"image size {size} is not one of 32, 64 and 256; type --image-size 64")
    identity = _identity(gathered, size, held_out)
    if target.exists():
        _same_or_refuse(target, identity, log)
    else:
        sides = split(gathered.pictures, together, held_out)
        facts = _facts(gathered, sides, target, name, size)
        _write(gathered, sides, facts, identity, machine, log)
    return _finish(target, name, log)


def split(
    pictures: list[Found], together: list[list[int]], held_out: float
) -> tuple[list[int], list[int]]:
    """(train, test) indices; a group of near-duplicates goes where a hash of it falls.

    `together` holds the groups as indices (`gathering.groups`). The side of a group depends on its
    contents alone, so pictures added later move no other. When chance leaves a side empty, the
    group nearest to the border changes side.
    """
    if len(together) < 2:
        raise UserError(
            "all pictures are near-duplicates of one another; there is nothing to learn"
        )
    place = [_place(min(pictures[index].sha256 for index in group)) for group in together]
    border = min(max(held_out, min(place)), sorted(place)[-2])
    sides: tuple[list[int], list[int]] = ([], [])
    for group, value in zip(together, place, strict=True):
        sides[value <= border].extend(group)
    return sorted(sides[0]), sorted(sides[1])


def _place(digest: str) -> float:
    """Uniform in [0, 1). Hashed again: the smallest of several sha256 is no longer uniform."""
    return int(hashlib.sha256(digest.encode()).hexdigest()[:13], 16) / 2.0**52


def stored_picture(data: bytes, image_size: int) -> tuple[bytes, str]:
    """(bytes, extension) for the shards: small enough to decode fast, plain enough for any decoder.

    A plain JPEG or PNG whose short side is at most twice the training size is kept as it is;
    others are turned upright, laid on white, reduced to that size, and stored as PNG up to 64
    pixels and as JPEG of quality 95 above.
    """
    facts = probe(data)
    limit = 2 * image_size
    if facts.plain and min(facts.width, facts.height) <= limit:
        return data, "jpg" if facts.kind == "jpeg" else "png"
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if facts.channels in (2, 4) and upright.mode != "CMYK" or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        picture = upright.convert("RGB")
    short = min(picture.size)
    if short > limit:
        size = tuple(max(1, round(side * limit / short)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if min(picture.size) <= 64:
        picture.save(buffer, "PNG")
        return buffer.getvalue(), "png"
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue(), "jpg"


def _write(
    gathered: Gathered,
    sides: tuple[list[int], list[int]],
    facts: Pictures,
    identity: str,
    machine: Machine,
    log: Log,
) -> None:
    pictures, classes = gathered.pictures, _classes(gathered)
    with (
        new_folder(facts.folder) as draft,
        log.progress("writing shards", len(pictures), "pictures") as bar,
    ):
        for side, chosen in zip(("train", "test"), sides, strict=True):

            def samples(chosen: list[int] = chosen) -> Iterator[dict]:
                for index in chosen:
                    yield _sample(pictures[index], classes, facts.size)
                    bar.advance()

            write_shards(draft / side, samples(), classes=classes)
            ShardSet(draft / side, verify=True)
        (draft / "contact.png").write_bytes(png(contact_sheet(pictures)))
        (draft / f"{facts.name}-autoencoder.yaml").write_text(autoencoder_recipe(facts, machine))
        (draft / f"{facts.name}-ldm.yaml").write_text(latent_recipe(facts, machine))
        record = {
            "identity": identity,
            "image_size": facts.size,
            "form": gathered.form,
            "classes": classes,
            "train": len(sides[0]),
            "test": len(sides[1]),
            "copies_left_out": gathered.copies,
            "left_out": [[str(path), reason] for path, reason in gathered.bad],
        }
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _classes(gathered: Gathered) -> list[str]:
    return sorted({p.label for p in gathered.pictures if p.label}) or ["picture"]


def _facts(
    gathered: Gathered, sides: tuple[list[int], list[int]], target: Path, name: str, size: int
) -> Pictures:
    return Pictures(
        name=name,
        folder=target,
        size=size,
        channels=1 if all(p.grey for p in gathered.pictures) else 3,
        classes=len(_classes(gathered)),
        train=len(sides[0]),
        captions=any(p.caption for p in gathered.pictures),
    )


def contact_sheet(pictures: list[Found]) -> np.ndarray:
    """Up to 64 pictures, chosen evenly by content, cut square: (H, W, 3) uint8."""
    picks = np.unique(np.linspace(0, len(pictures) - 1, SHEET_PICTURES).round().astype(int))
    cells = []
    for index in picks:
        with Image.open(pictures[index].path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        side = (SHEET_SIDE, SHEET_SIDE)
        cells.append(np.asarray(ImageOps.fit(upright, side, Image.Resampling.LANCZOS)))
    return picture_grid(np.stack(cells), scale=1, gap=3)


def _sample(picture: Found, classes: list[str], size: int) -> dict:
    data, extension = stored_picture(picture.path.read_bytes(), size)
    return {
        "key": f"{picture.sha256[:20]}-{classes.index(picture.label or classes[0])}",
        "image": data,
        "extension": extension,
        "label": classes.index(picture.label or classes[0]),
        "caption": picture.caption,
        "meta": {"file": picture.path.name},
    }


def _data_name(text: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name:
        raise UserError(f"'{text}' gives no name for the data set; type --name with letters")
    return name


def _identity(gathered: Gathered, size: int, held_out: float) -> str:
    content = [[p.sha256, p.label, p.caption] for p in gathered.pictures]
    return hashlib.sha256(json.dumps([content, size, held_out]).encode()).hexdigest()


def _same_or_refuse(target: Path, identity: str, log: Log) -> None:
    record = target / RECORD
    try:
        known = json.loads(record.read_text())["identity"]
    except (OSError, ValueError, KeyError):
        known = None
    if known != identity:
        raise UserError(
            f"{target} already holds something else (other pictures, or another size); type "
            f"--name with another name, or remove {target}"
        )
    log.info(f"{target} already holds exactly these pictures")


def _report(gathered: Gathered, together: list[list[int]], log: Log) -> None:
    for path, reason in gathered.bad[:NAMED_BAD]:
        log.warn(f"left out {path}: {reason}")
    if len(gathered.bad) > NAMED_BAD:
        log.warn(f"left out {len(gathered.bad) - NAMED_BAD} more; {RECORD} names them all")
    if len(gathered.pictures) < 2:
        raise UserError("fewer than two usable pictures; the reasons are above")
    twins = sum(len(group) for group in together if len(group) > 1)
    copies = f"; {gathered.copies} exact copies left out" if gathered.copies else ""
    close = f"; {twins} have a near-duplicate, which stays on the same side" if twins else ""
    log.info(f"{len(gathered.pictures):,} pictures, {gathered.form}{copies}{close}")


def _finish(target: Path, name: str, log: Log) -> Started:
    record = json.loads((target / RECORD).read_text())
    autoencoder, latent = target / f"{name}-autoencoder.yaml", target / f"{name}-ldm.yaml"
    train, test = record["train"], record["test"]
    log.info(
        f"{train:,} to train on and {test:,} held out, {len(record['classes'])} class(es), "
        f"{record['image_size']} pixels; look at {target / 'contact.png'}"
    )
    if train + test < FEW_PICTURES:
        log.warn(
            f"{train + test:,} pictures are few: below {FEW_PICTURES:,} a model may memorise them. "
            f"Compare samples with their nearest training pictures on the run's page, and report "
            f"KID rather than FID, which is biased at this size"
        )
    fetched = record["form"] != "captions" or ENCODER.is_dir()
    commands = [
        *([] if fetched else [f"etude data fetch {ENCODER.name}"]),
        f"etude train {autoencoder} --run {name}-autoencoder",
        f"etude train {latent} --run {name}-ldm",
        f"etude sample {name}-ldm --count 64",
    ]
    log.info("next:\n" + "\n".join(f"  {command}" for command in commands))
    return Started(target, autoencoder, latent, (train, test), commands)
