"""The flags of the world's countries as shards by region; called by fetching.py for `flags`."""

import io
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from etude.core.errors import UserError
from etude.core.log import Log
from etude.data.shards import write_shards

from .unpacking import members

SIDE = 128
_PICTURES, _COUNTRIES = "package/png250px/", "package/countries.json"


def flags(paths: Sequence[Path], folder: Path, log: Log) -> str:
    """Flags on white at 128 pixels, captions with the country's name, labels by region.

    `paths` are the pictures' package and the one with the list of countries (cca2, region, name).
    """
    text = next((data for name, data in members(paths[1]) if name == _COUNTRIES), None)
    if text is None:
        raise UserError(f"{paths[1]} holds no {_COUNTRIES}; download it again")
    pictures = {
        PurePosixPath(name).stem: data
        for name, data in members(paths[0])
        if name.startswith(_PICTURES)
    }
    countries = sorted(json.loads(text), key=lambda country: country["cca2"])
    regions = sorted({country["region"] for country in countries})
    samples = [
        {
            "key": country["cca2"].lower(),
            "image": _squared(pictures[country["cca2"].lower()]),
            "extension": "png",
            "label": regions.index(country["region"]),
            "caption": f"the flag of {country['name']['common']}",
        }
        for country in countries
        if country["cca2"].lower() in pictures
    ]
    write_shards(folder, samples, classes=regions)
    return f"{len(samples)} flags of {len(regions)} regions as shards"


def _squared(data: bytes) -> bytes:
    """A picture as large as fits into a white square, as PNG."""
    flag = Image.open(io.BytesIO(data)).convert("RGBA")
    scale = SIDE / max(flag.size)
    size = tuple(max(1, round(side * scale)) for side in flag.size)
    flag = flag.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(flag, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    buffer = io.BytesIO()
    square.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
