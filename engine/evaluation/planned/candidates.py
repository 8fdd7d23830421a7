"""Who draws in a plan: every model, checkpoint and guidance scale; called by running.py."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from etude.core.errors import UserError

from ..generators import GENERATORS, DrawsPictures, NoCheckpointYet, Wanted
from ..sets import SUFFIXES
from .recipe import ModelConfig, PlanRecipe

_OF_MODELS = {".yaml", ".safetensors", ".pt", ".pth", ".ckpt", ".bin"}  # endings of their files


@dataclass(frozen=True)
class Candidate:
    """One model at one checkpoint and one guidance scale.

    Attributes:
        model: its name in the plan, or the model that it counts as.
        run: its name in the plan.
        checkpoint: images seen; None where the source has one set of weights.
        guidance: None leaves the generator's own, or is a folder of pictures.
    """

    model: str
    run: str
    config: ModelConfig
    checkpoint: int | None
    guidance: float | None

    @classmethod
    def of(
        cls,
        recipe: PlanRecipe,
        run: str,
        checkpoint: int | None = None,
        guidance: float | None = None,
    ) -> "Candidate":
        """The candidate of a plan's model `run`."""
        config = recipe.models[run]
        return cls(config.counts_as or run, run, config, checkpoint, guidance)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of pictures that somebody drew."""
        return self.config.kind == "pictures"

    @property
    def source(self) -> str:
        """What draws, beside checkpoint and guidance: rows of one model must agree in it."""
        options = json.dumps(self.config.options, sort_keys=True) if self.config.options else ""
        return " ".join(filter(None, (self.config.source, self.config.weights, options)))

    @property
    def title(self) -> str:
        """As tables and pictures name it."""
        parts = [self.run]
        if self.checkpoint is not None:
            parts.append(f"at {self.checkpoint:,} images")
        if self.guidance is not None:
            parts.append(f"guidance {self.guidance:g}")
        return ", ".join(parts)

    def open(self, prompts: tuple[str, ...], device: torch.device | str) -> DrawsPictures:
        """Its generator; `prompts` are all that it will be asked for."""
        wanted = Wanted(
            self.config.source,
            self.checkpoint,
            self.guidance,
            self.config.weights,
            prompts,
            device,
            tuple(sorted(self.config.options.items())),
        )
        return GENERATORS.get(self.config.kind).open(wanted)


def candidates(recipe: PlanRecipe) -> list[Candidate]:
    """Every candidate of a plan, in its order; checkpoints ascending, then guidance.

    A plan that watches takes what is there.

    Raises:
        UserError: a model keeps none of the checkpoints that the plan asks for.
    """
    found = []
    for name, config in recipe.models.items():
        if config.kind == "pictures":
            found.append(Candidate.of(recipe, name))
            continue
        try:
            kept = _checkpoints(name, config, waits=recipe.watch_minutes is not None)
        except NoCheckpointYet:
            if recipe.watch_minutes is None:
                raise
            continue
        scales = recipe.guidance or (None,)
        found += [Candidate.of(recipe, name, seen, scale) for seen in kept for scale in scales]
    return found


def check_kinds(recipe: PlanRecipe) -> None:
    """Raise where a model's kind is none, or its source is of another."""
    for name, config in recipe.models.items():
        kinds = ["pictures", *GENERATORS.names()]
        if config.kind not in kinds:
            raise UserError(
                f"models.{name}.kind: there is no kind {config.kind!r} of model; choose one of"
                f" {', '.join(kinds)}"
            )
        source = Path(config.source)
        if config.kind == "run" and not any(source.glob("*.json")):
            endings = {path.suffix.lower() for path in source.glob("**/*")}
            if endings & SUFFIXES and not endings & _OF_MODELS:
                raise UserError(
                    f"models.{name}: {source} is no run but holds pictures; to evaluate these set"
                    f" models.{name}.kind=pictures"
                )


def is_kept(candidate: Candidate) -> bool:
    """Whether its source still has its checkpoint: a run that is being trained drops old ones."""
    if candidate.checkpoint is None:
        return True
    try:
        there = GENERATORS.get(candidate.config.kind).checkpoints(candidate.config.source)
    except NoCheckpointYet:
        return False
    return candidate.checkpoint in there


def _checkpoints(name: str, config: ModelConfig, waits: bool) -> list[int | None]:
    kept = GENERATORS.get(config.kind).checkpoints(config.source)
    if config.checkpoints == "last":
        return [kept[-1]] if kept else [None]
    if config.checkpoints == "all":
        return list(kept) or [None]
    missing = [seen for seen in config.checkpoints if seen not in kept]
    if missing and not waits:
        listed = ", ".join(map(str, kept)) or "none"
        raise UserError(
            f"models.{name}: {config.source} keeps no checkpoint at {missing[0]} images;"
            f" it keeps {listed}"
        )
    return sorted(set(config.checkpoints) - set(missing))
