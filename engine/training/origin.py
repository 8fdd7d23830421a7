"""Where a run's first weights come from: the `start` of its recipe, found, hashed and loaded.

`resolved` is called before a run's folder is opened, so that the run's name and the comparison of
ranks hold the hash of the weights; `begin` once per run, before the strategy takes the model and
its averages copy it. A resumed run needs neither: its own `recipe.yaml` says what it began from.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from etude.convert.checkpoint import SUFFIXES, read_denoiser, read_file, weights_file
from etude.core.checkpoint import latest_checkpoint, read_weights, verify_checkpoint
from etude.core.errors import UserError
from etude.core.files import file_sha256, write_json_atomic
from etude.core.log import Log
from etude.core.recipe import Recipe
from etude.core.run import Run, load_run
from etude.published import STATED, described, dit_config, is_published, network
from etude.transfer import Report, StartConfig, positioned, transfer

from .recipe import LatentDiffusionRecipe


@dataclass(frozen=True)
class Weights:
    """Weights that were found: where they lie, of what model, and the hash of their content.

    `weights` is the profile of a run's checkpoint; "" for a file or folder of another project.
    """

    place: Path
    name: str
    config: Any
    classes: list[str] | None
    sha256: str
    weights: str = ""

    def read(self) -> dict[str, Tensor]:
        """The tensors in our names."""
        if self.weights:
            return read_weights(self.place, self.weights)
        return read_denoiser(self.place, self.config)[0]


def find_weights(start: StartConfig, target: Any) -> Weights:
    """What a `start` names, for a model of the configuration `target`.

    Raises:
        UserError: there is nothing, or it cannot be read, or an option has no effect on it.
    """
    place = Path(start.source)
    if place.is_file() or (place.is_dir() and not (place / "recipe.yaml").exists()):
        return _published(place, start, target)
    if not place.exists() and place.suffix in SUFFIXES:
        raise UserError(f"start.from={place} does not exist: name a run, a weights file or folder")
    recipe, folder = load_run(place)
    if recipe.kind != "ldm":
        raise UserError(f"{folder} is a run of kind {recipe.kind!r}: name one of kind 'ldm'")
    if start.model:
        raise UserError(f"{folder} says what its model is: leave out start.model")
    checkpoint = latest_checkpoint(folder / "checkpoints", hashes=False)
    if checkpoint is None:
        raise UserError(
            f"{folder} has no complete checkpoint yet: type the command that trains it again"
        )
    weights = start.weights or recipe.default_weights()
    with verify_checkpoint(checkpoint, hashes=False) as opened:
        manifest = opened.manifest
    if weights not in manifest["profiles"]:
        kept = ", ".join(manifest["profiles"])
        raise UserError(f"{folder} has no weights {weights!r}: set start.weights to one of {kept}")
    content = json.dumps([weights, sorted(file["sha256"] for file in manifest["files"])])
    return Weights(
        checkpoint,
        f"{folder.name} {weights} at {manifest['images_seen']:,} images",
        recipe.model,
        list(manifest["extra"]["classes"]),
        hashlib.sha256(content.encode()).hexdigest(),
        weights,
    )


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with its `start` found out: the weights' hash, and the positions they ask for.

    A recipe that holds a hash already (a run's own) and whose source is not there, or is another
    by now, stays as it is: a run that has begun can go on, another will be refused by `begin`.

    Raises:
        UserError: as `find_weights` and `positioned`.
    """
    if not isinstance(recipe, LatentDiffusionRecipe) or not recipe.start.source:
        return recipe
    start = recipe.start
    try:
        found = find_weights(start, recipe.model)
    except UserError:
        if start.sha256:
            return recipe
        raise
    if start.sha256 and found.sha256 != start.sha256:
        return recipe
    return recipe.model_copy(
        update={
            "start": start.model_copy(update={"sha256": found.sha256}),
            "model": positioned(recipe.model, found.config, start.positions),
        }
    )


def begin(
    recipe: LatentDiffusionRecipe, model: nn.Module, classes: list[str], run: Run, log: Log
) -> Report | None:
    """Give a new run's model its first weights; writes `transfer.json` into the run.

    Returns:
        What was done; None for a recipe without a `start`.

    Raises:
        UserError: the source is not there, is not the one of the hash, or does not fit.
    """
    start = recipe.start
    if not start.source:
        return None
    found = find_weights(start, recipe.model)
    if start.sha256 and found.sha256 != start.sha256:
        raise UserError(
            f"start.from={start.source} holds other weights ({found.sha256[:16]}) than"
            f" start.sha256={start.sha256[:16]}: name those, or leave out start.sha256"
        )
    report = transfer(
        found.read(),
        found.config,
        model,
        source_classes=found.classes,
        classes=classes,
        match=start.classes,
        allow_new=start.allow_new,
        share=start.share,
        name=found.name,
    )
    if log.rank == 0:
        stated = {"from": start.source, "weights": found.weights, "sha256": found.sha256}
        stated["positions"] = start.positions
        write_json_atomic(run.folder / "transfer.json", stated | report.record())
    log.table(*report.table())
    log.info(report.line)
    return report


def _published(place: Path, start: StartConfig, target: Any) -> Weights:
    """Weights of another project, whose configuration is read off them or told by `start`."""
    if start.weights:
        raise UserError(f"{place} holds one set of weights: leave out start.weights")
    if (place / STATED).exists():
        if start.model:
            raise UserError(f"{place} says what its model is: leave out start.model")
        found = described(place)
        file = weights_file(found.weights)
        return Weights(file, place.name, found.model, found.classes or None, file_sha256(file))
    if place.is_dir() and (place / "transformer").is_dir() and (start.model or not _dit(target)):
        place = place / "transformer"
    candidates = [target]
    if start.model:
        candidates = [_changed(target, start.model)]
    elif place.is_dir() and is_published(place) and _dit(target):
        place, config = network(place)
        candidates = [config]
    elif place.is_file() and _dit(target):
        with suppress(UserError):
            candidates.insert(0, dit_config(read_file(place), place))
    file, refusal = weights_file(place), None
    for config in candidates:
        try:
            read_denoiser(file, config)
        except UserError as error:
            refusal = error
            continue
        return Weights(file, place.name, config, None, file_sha256(file))
    raise UserError(
        f"{refusal}; where the source's model differs from this one, say so in start.model, for"
        " example start.model={input_size: 32}"
    )


def _dit(config: Any) -> bool:
    return config.family == "dit"


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    try:
        return type(config).model_validate(config.model_dump() | changes)
    except ValueError as error:
        reason = str(error).splitlines()
        raise UserError(f"start.model does not make a model: {' '.join(reason[1:3])}") from None
