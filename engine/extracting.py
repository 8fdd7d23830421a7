"""`etude extract SOURCE --extractors ...`: features of any pictures into a store, without a recipe.

Called by the command line. Weights are looked for where `etude data fetch` puts them when nobody
says where they are.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etude.core import distributed
from etude.core.errors import UserError
from etude.core.log import Log
from etude.core.signals import Stopper
from etude.evaluation.extract import extract_set, feature_key
from etude.evaluation.sets import open_pictures
from etude.metrics.extractors import EXTRACTORS, FETCHED, Extractor, taps_by_kind
from etude.metrics.store import FeatureStore


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
        options: of the pictures "image_size=256", "fit=squash", "channels=1"; of an extractor
            "NAME.OPTION=VALUE".

    Returns:
        Rows of (features, pictures, address in the store), and pictures per second by stage where
        something was missing; both empty on other processes than the first.

    Raises:
        UserError: an unknown extractor or option, missing weights, pictures that cannot be read.
    """
    names = [name.strip() for name in names]
    own, of_pictures = _parted(options, [*taps_by_kind(names)])
    form = _form(of_pictures)
    pictures = open_pictures(source, **form)
    world = distributed.start()
    log = Log(None, rank=world.rank, quiet=None if world.rank == 0 else True)
    opened = open_named(names, weights, dtype=dtype, device=world.device, options=own)
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
    names: Sequence[str],
    weights: Sequence[str],
    *,
    dtype: str,
    device: object,
    options: Mapping[str, dict[str, Any]] = {},
) -> list[Extractor]:
    """Extractors by name, one network for all the taps that are named of it.

    Args:
        options: extractor -> its own options.
    """
    places = dict(FETCHED)
    for given in weights:
        name, equals, path = given.partition("=")
        if not equals:
            raise UserError(f"--weights {given} names no file: write --weights {name}=PATH")
        if name not in taps_by_kind(names):
            raise UserError(f"--weights {given} has no effect: {name} is not in --extractors")
        if not EXTRACTORS.get(name).needs_weights:
            raise UserError(f"--weights {given} has no effect: {name} needs no weights")
        places[name] = path
    opened = []
    for kind, asked in taps_by_kind(names).items():
        needs = EXTRACTORS.get(kind).needs_weights
        place = places.get(kind, "") if needs else ""
        if needs and not place:
            raise UserError(f"the {kind} extractor needs weights: add --weights {kind}=PATH")
        more = options.get(kind, {})
        opened.append(Extractor(kind, place, taps=asked, dtype=dtype, device=device, **more))
    return opened


def _parted(
    options: Sequence[str], kinds: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Options of extractors by extractor, from NAME.OPTION=VALUE; and the rest."""
    own: dict[str, dict[str, Any]] = {}
    rest = []
    for option in options:
        where, _, value = option.partition("=")
        kind, dot, name = where.partition(".")
        if not dot:
            rest.append(option)
        elif kind not in kinds:
            raise UserError(f"{option} has no effect: {kind} is not in --extractors")
        else:
            try:
                own.setdefault(kind, {})[name] = json.loads(value)
            except ValueError:
                own.setdefault(kind, {})[name] = value
    return own, rest


def _form(options: Sequence[str]) -> dict:
    """How pictures are read, from NAME=VALUE; as `open_pictures` takes it."""
    known = {"image_size": "size", "fit": "fit", "channels": "channels"}
    form: dict = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in known:
            raise UserError(
                f"{option}: pictures have the options {', '.join(known)}; an extractor's own are"
                f" typed as EXTRACTOR.{name}=VALUE"
            )
        if name != "fit" and not (value.isdecimal() and int(value)):
            raise UserError(f"{option}: give a number of at least 1, such as {name}=3")
        if name == "channels" and value not in ("1", "3"):
            raise UserError(f"{option}: pictures are grey, channels=1, or in colour, channels=3")
        form[known[name]] = value if name == "fit" else int(value)
    return form
