"""`etude extract SOURCE --extractors ...`: features of any pictures into a store, without a recipe.

Called by the command line. Weights are looked for where `etude data fetch` puts them when nobody
says where they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from etude.core import distributed
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.signals import Stopper
from etude.evaluation.extract import extract_set, feature_key
from etude.evaluation.sets import open_pictures
from etude.metrics.extractors import EXTRACTORS, Extractor, taps_by_kind
from etude.metrics.store import FeatureStore

# Where fetched weights lie, by extractor.
FETCHED = {
    "inception": "data/inception",
    "mobilenet": "data/mobilenet",
    "resnet50": "data/resnet50",
    "vgg16": "data/lpips",
}


def extract_source(
    source: str,
    names: Sequence[str],
    weights: Sequence[str],
    *,
    store: Path,
    dtype: str = "float32",
    batch_size: int = 64,
    options: Sequence[str] = (),
) -> tuple[list[list[str]], dict[str, float]]:
    """Features of a folder of shards or pictures, or of an `.npz`, into a store.

    Args:
        names: extractors, with a tap where it is not the first: "inception", "inception/64".
        weights: "NAME=PATH" for every extractor whose weights lie elsewhere than fetched ones.
        options: "image_size=256", "fit=squash", "channels=1": of the pictures.

    Returns:
        Rows of (features, pictures, address in the store), and pictures per second by stage where
        something was missing; both empty on other processes than the first.

    Raises:
        UserError: an unknown extractor or option, missing weights, pictures that cannot be read.
    """
    form = _form(options)
    pictures = open_pictures(source, **form)
    world = distributed.start()
    log = Log(None, rank=world.rank, quiet=None if world.rank == 0 else True)
    opened = open_named(names, weights, dtype=dtype, device=world.device)
    features = FeatureStore(store)
    with Stopper(watch_parent=world.size > 1) as stopper:
        log.on_advance = stopper.check
        rates = extract_set(pictures, opened, features, batch_size=batch_size, log=log, world=world)
    rows = [
        [name, str(len(pictures)), feature_key(pictures, one, name).digest()]
        for one in opened
        for name in one.dims
    ]
    if world.size > 1:
        distributed.stop(world)
    return (rows, rates) if world.rank == 0 else ([], {})


def open_named(
    names: Sequence[str], weights: Sequence[str], *, dtype: str, device: object
) -> list[Extractor]:
    """Extractors by name, one network for all the taps that are named of it."""
    places = dict(FETCHED)
    for given in weights:
        name, equals, path = given.partition("=")
        if not equals:
            raise UserError(f"--weights {given} names no file: write --weights {name}=PATH")
        if name not in [each.partition("/")[0] for each in names]:
            raise UserError(f"--weights {given} has no effect: {name} is not in --extractors")
        places[name] = path
    opened = []
    for kind, asked in taps_by_kind(names).items():
        needs = EXTRACTORS.get(kind).needs_weights
        place = places.get(kind, "") if needs else ""
        if needs and not place:
            raise UserError(f"the {kind} extractor needs weights: add --weights {kind}=PATH")
        opened.append(Extractor(kind, place, taps=asked, dtype=dtype, device=device))
    return opened


def _form(options: Sequence[str]) -> dict:
    """How pictures are read, from NAME=VALUE; as `open_pictures` takes it."""
    known = {"image_size": "size", "fit": "fit", "channels": "channels"}
    form: dict = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in known:
            raise UserError(f"{option}: pictures have the options {', '.join(known)}")
        form[known[name]] = value if name == "fit" else json.loads(value or "null")
        if name != "fit" and not isinstance(form[known[name]], int):
            raise UserError(f"{option}: give a number, such as {name}=3")
    return form
