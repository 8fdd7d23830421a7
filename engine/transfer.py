"""Starting a denoiser from the weights of another one of its family.

Called by training where a recipe has a `start`. `transfer` goes through the target's tensors by
name and says of each what became of it:

    kept      the source's, as it is
    resized   made of the source's: learned tables of positions and of relative positions by
              bicubic interpolation over their grids, class tables by the names of the classes, the
              shared half of a final layer with and without variances; fixed tables of positions are
              computed by the target's configuration (`positioned` says how they go on)
    new       as the target was initialised: what the source has not, or has with other channels
    unused    in the source alone

A layer is taken whole or not at all: a new weight has a new bias. What a condition enters by is
taken where it means the same (a control of the same name and scale); between a class and a text the
embedders are new, while the attention that reads them is kept. Berrada et al. 2024 train at 512
pixels from such starts, and propose resampled positions and a rescaled noise schedule
(`objective.shift`) for it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.models.conditioning import ControlConfig
from etude.models.denoiser import DenoiserConfig
from etude.models.pixart import MICRO

Group = Literal["kept", "resized", "new", "unused"]
GROUPS: tuple[Group, ...] = ("kept", "resized", "new", "unused")
CLASS_TABLES = ("y_embedder.embedding_table.weight", "class_embedder.embedding_table.weight")
LEARNED_TABLES = ("pos_embed", "decoder_pos_embed")  # of mdt; elsewhere pos_embed is computed
BIAS_TABLE = "relative_position_bias_table"
EXTRA_ROWS = 3  # of a bias table, for a class token
FINAL = ("final_layer.linear.", "out.2.")  # the last layers of transformers and of the U-Net
NAMED = 6  # modules listed in a refusal before it says how many more there are


class StartConfig(Config):
    """Where the first weights come from, and what may differ between there and here."""

    source: str = option(
        "",
        "a run, a weights file, or a folder with one; empty: start from random weights",
        alias="from",
    )
    weights: str = option(
        "", "raw or ema:<decay> of a run; empty: the longest average that it kept"
    )
    model: dict[str, Any] = option(
        {}, "fields of the source's model that differ from this one's; for weights files"
    )
    positions: Literal["interpolate", "extrapolate", "as_given"] = option(
        "interpolate",
        "fixed positions on a larger grid: interpolate keeps their range, extrapolate their step,"
        " as_given leaves the model's own fields alone",
    )
    classes: Literal["names", "numbers"] = option(
        "names", "what says which of the source's classes is which of this data's"
    )
    allow_new: list[str] = option(
        [], "beginnings of the names of tensors that may start as initialised; '*': any"
    )
    share: float = option(
        0.5, "refuse a source that gives less than this share of the parameters", gt=0, le=1
    )
    sha256: str = option(
        "", "what the source's weights must hash to; found out when a run begins, then kept"
    )

    @model_validator(mode="after")
    def _check(self) -> "StartConfig":
        if not self.source:
            idle = [name for name in type(self).model_fields if self.differs(name)]
            if idle:
                raise ValueError(
                    f"start.{idle[0]} has no effect without start.from: name a run or a"
                    " weights file there"
                )
        return self


@dataclass(frozen=True)
class Move:
    """What became of one tensor: its name, group, number of elements, and how it was made."""

    name: str
    group: Group
    elements: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a transfer did; `share` is that of the target's trained parameters it gave."""

    moves: tuple[Move, ...]
    share: float
    source: str = ""

    def names(self, group: Group) -> list[str]:
        return [move.name for move in self.moves if move.group == group]

    def elements(self, group: Group) -> int:
        return sum(move.elements for move in self.moves if move.group == group)

    @property
    def line(self) -> str:
        """All of it in one line."""
        groups = ", ".join(
            f"{group} {len(self.names(group))} tensors ({self.elements(group):,})"
            for group in GROUPS
        )
        origin = f" from {self.source}" if self.source else ""
        return f"{self.share:.1%} of the parameters{origin}: {groups}"

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, columns and rows: what was kept in one row, the rest by kind of tensor."""
        counts: dict[tuple[str, str, str], list[int]] = {}
        for move in self.moves:
            kind = "" if move.group == "kept" else re.sub(r"\.\d+(?=\.|$)", ".*", move.name)
            counts.setdefault((move.group, kind, move.note), []).append(move.elements)
        rows = [
            [group, kind, note, f"{len(sizes)}", f"{sum(sizes):,}"]
            for (group, kind, note), sizes in sorted(
                counts.items(), key=lambda item: GROUPS.index(item[0][0])
            )
        ]
        title = f"weights from {self.source}" if self.source else "weights from another model"
        return title, ["group", "which", "how", "tensors", "numbers"], rows

    def record(self) -> dict[str, Any]:
        """Everything, for a file."""
        groups = {
            group: {
                "tensors": len(self.names(group)),
                "elements": self.elements(group),
                "names": {m.name: m.note for m in self.moves if m.group == group},
            }
            for group in GROUPS
        }
        return {"source": self.source, "share": self.share, "groups": groups}


def transfer(
    state: Mapping[str, Tensor],
    source: DenoiserConfig,
    model: nn.Module,
    *,
    source_classes: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    match: Literal["names", "numbers"] = "names",
    allow_new: Sequence[str] = ("*",),
    share: float = 0.5,
    name: str = "",
) -> Report:
    """Load what fits of a source's weights into a model on the CPU.

    Args:
        state: the source's tensors in our names.
        source: its configuration; the model's own is `model.config`.
        source_classes, classes: names of the classes there and here; None where nobody knows.
        match: "numbers" takes class k for class k, without regard to names.
        allow_new: beginnings of names that may be new; "*" for any.
        share: least share of the trained parameters that the source must give.
        name: of the source, for the report.

    Raises:
        UserError: another family, or heads, or norm; too little fits; something new that is not
            allowed. The model is then as it was.
    """
    _check_kin(source, model.config)
    plan = _Plan(state, source, model, source_classes, classes, match)
    report = plan.report(share, name)
    forbidden = [
        n for n in report.names("new") if not any(p == "*" or n.startswith(p) for p in allow_new)
    ]
    if forbidden:
        modules = list(dict.fromkeys(_module(n) for n in forbidden))
        more = f" and {len(modules) - NAMED} more" if len(modules) > NAMED else ""
        roots = ", ".join(dict.fromkeys(n.split(".")[0] for n in forbidden))
        raise UserError(
            f"{name or 'the source'} has nothing for {', '.join(modules[:NAMED])}{more}"
            f"{_why(plan, forbidden)}: set start.allow_new=[{roots}] to start these as initialised"
        )
    with torch.no_grad():
        target = model.state_dict()
        for key, value in plan.values.items():
            target[key].copy_(value)
    return report


class _Plan:
    """What each of the target's tensors becomes, before anything is written."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        source: DenoiserConfig,
        model: nn.Module,
        source_classes: Sequence[str] | None,
        classes: Sequence[str] | None,
        match: str,
    ) -> None:
        self.state, self.source, self.model, self.config = state, source, model, model.config
        self.source_classes, self.classes, self.match = source_classes, classes, match
        self.target = model.state_dict()
        self.learned = {n for n, p in model.named_parameters() if p.requires_grad}
        self.renamed = _renamed_controls(source, self.config)
        self.values: dict[str, Tensor] = {}
        self.moves: dict[str, Move] = {}
        found = {key: self._made(key) for key in self.target}
        lost = {_module(key) for key, (group, _, _) in found.items() if group == "new"}
        for key, (group, value, note) in found.items():
            if group != "new" and _module(key) in lost:
                group, value = "new", None
            if value is not None:
                self.values[key] = value
            self.moves[key] = Move(key, group, self.target[key].numel(), note)
        read = {self._origin(key) for key, move in self.moves.items() if move.group != "new"}
        for key, value in state.items():
            if key not in read:
                self.moves[f"{key} (source)"] = Move(key, "unused", value.numel())

    def report(self, share: float, name: str) -> Report:
        given = [m for n, m in self.moves.items() if n in self.learned and m.group != "new"]
        total = sum(self.target[key].numel() for key in self.learned)
        reached = sum(move.elements for move in given) / max(total, 1)
        if not given or reached < share:
            raise UserError(
                f"{name or 'the source'} gives {reached:.1%} of this model's parameters, less than"
                f" start.share={share:g}: name weights of a model of this width and depth"
            )
        return Report(tuple(self.moves.values()), reached, name)

    def _origin(self, key: str) -> str | None:
        """The source's name of a target's tensor; None where it has no such thing."""
        for prefix, other in self.renamed.items():
            if key.startswith(prefix):
                return None if other is None else other + key[len(prefix) :]
        return key

    def _made(self, key: str) -> tuple[Group, Tensor | None, str]:
        """Group, value (None: leave the target's) and note of a target's tensor."""
        here, there = self.target[key], self.state.get(self._origin(key) or "")
        if key == "pos_embed" and key not in self.learned:
            if there is not None and there.shape == here.shape:
                if torch.allclose(there.to(here), here, rtol=0, atol=1e-5):
                    return "kept", there, ""
            return "resized", None, "computed"
        if there is None:
            return "new", None, ""
        if key in CLASS_TABLES and there.shape[1:] == here.shape[1:]:
            return self._classes(here, there)
        if key.startswith(FINAL):
            return self._final(here, there)
        if there.shape == here.shape:
            return "kept", there, ""
        if key in LEARNED_TABLES and there.shape[2] == here.shape[2]:
            value = resize_positions(there, _side(here.shape[1]))
            return "resized", value, f"bicubic, {there.shape[1]} -> {here.shape[1]} positions"
        if key.endswith(BIAS_TABLE) and there.shape[1] == here.shape[1]:
            side = _side(len(here) - EXTRA_ROWS)
            value = resize_bias(there, (side + 1) // 2)
            return "resized", value, f"bicubic, {len(there)} -> {len(here)} offsets"
        return "new", None, f"{tuple(there.shape)} there"

    def _classes(self, here: Tensor, there: Tensor) -> tuple[Group, Tensor | None, str]:
        """Rows by class; the last is that of no class, in both."""
        if self.match == "numbers":
            if there.shape == here.shape:
                return "kept", there, ""
            rows = [(k, k) for k in range(min(len(here), len(there)) - 1)]
        elif self.source_classes is None or self.classes is None:
            return "new", None, "the classes have no names"
        elif list(self.source_classes) == list(self.classes):
            return "kept", there, ""
        else:
            number = {label: k for k, label in reversed(list(enumerate(self.source_classes)))}
            rows = [(k, number[c]) for k, c in enumerate(self.classes) if c in number]
        value = here.clone()
        for k, row in [*rows, (-1, -1)]:
            value[k] = there[row].to(value)
        return "resized", value, f"{len(rows)} of {len(here) - 1} classes by {self.match[:-1]}"

    def _final(self, here: Tensor, there: Tensor) -> tuple[Group, Tensor | None, str]:
        """A last layer: rows are (pixels of a patch, channels), variances behind the rest."""
        source, target = self.source, self.config
        area, other = (getattr(config, "patch_size", 1) ** 2 for config in (target, source))
        inner = here.shape[1:] == there.shape[1:]
        if source.in_channels != target.in_channels or area != other or not inner:
            return "new", None, "other channels"
        if source.learn_sigma == target.learn_sigma:
            return "kept", there, ""
        value, shared = here.clone(), target.in_channels
        value.unflatten(0, (area, -1))[:, :shared] = there.unflatten(0, (area, -1))[:, :shared]
        return "resized", value, "without variances" if source.learn_sigma else "new variances"


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A learned table (1, N, D) of a square grid for a grid of another side: (1, grid^2, D)."""
    side = _side(table.shape[1])
    if side == grid:
        return table
    planes = table[0].unflatten(0, (side, side)).permute(2, 0, 1)
    return _bicubic(planes, grid).permute(1, 2, 0).flatten(0, 1)[None].to(table.dtype)


def resize_bias(table: Tensor, grid: int) -> Tensor:
    """A table of relative positions ((2 g - 1)^2 + 3, H) for another grid; its last rows stay."""
    rows = len(table) - EXTRA_ROWS
    side = _side(rows)
    if side == 2 * grid - 1:
        return table
    planes = table[:rows].t().unflatten(1, (side, side))
    offsets = _bicubic(planes, 2 * grid - 1).flatten(1).t().to(table.dtype)
    return torch.cat((offsets, table[rows:]))


def positioned(target: Any, source: Any, how: str) -> Any:
    """The target's configuration with its fixed positions going on from those of the source.

    Args:
        target, source: configurations of one family.
        how: `StartConfig.positions`. On a grid of twice the side "interpolate" puts the tokens half
            as far apart, so that the range stays; "extrapolate" goes on beyond it.

    Raises:
        UserError: the family has no such choice, or the target's own fields say otherwise.
    """
    if how == "as_given" or source.family != target.family:
        return target
    if target.family in ("mdt", "unet"):
        if how == "extrapolate":
            reason = "has no positions" if target.family == "unet" else "learns its positions"
            raise UserError(f"family {target.family} {reason}: leave out start.positions")
        return target
    here, there = (config.grid for config in (target, source))
    if target.family == "pixart":
        given = (target.base_size or here, target.interpolation_scale)
        base = source.base_size or there
        wanted = (base, source.interpolation_scale)
        if how == "extrapolate":
            wanted = (here, source.interpolation_scale * there / base)
        fields = ("base_size", "interpolation_scale")
        default = (here, 1.0)
    else:
        given, default = (target.position_base or here,), (here,)
        base = source.position_base or there
        if how == "extrapolate":
            if base * here % there:
                raise UserError(
                    f"start.positions: extrapolate needs a whole model.position_base, here"
                    f" {base * here / there:g}: set start.positions: interpolate"
                )
            base = base * here // there
        wanted, fields = (base,), ("position_base",)
    changes = {}
    for name, value, own, usual in zip(fields, wanted, given, default, strict=True):
        if own == value:
            continue
        if own != usual:
            raise UserError(
                f"model.{name}={own:g} contradicts start.positions: {how}, which takes {value:g}:"
                f" set model.{name}={value:g}, or start.positions: as_given"
            )
        changes[name] = value
    return target.model_copy(update=changes)


def _bicubic(planes: Tensor, side: int) -> Tensor:
    """Planes (C, h, w) to (C, side, side), float32 at least."""
    planes = planes.to(torch.promote_types(planes.dtype, torch.float32))[None]
    return F.interpolate(planes, size=(side, side), mode="bicubic", align_corners=False)[0]


def _side(count: int) -> int:
    side = round(count**0.5)
    if side * side != count:
        raise UserError(f"{count} positions are not those of a square grid")
    return side


def _module(name: str) -> str:
    """The layer that a tensor belongs to; a tensor of the model's own is a layer by itself."""
    return name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name


def _why(plan: _Plan, names: Sequence[str]) -> str:
    notes = dict.fromkeys(plan.moves[name].note for name in names)
    said = ", ".join(note for note in notes if note)
    hint = "; start.classes=numbers takes them by number" if "no names" in said else ""
    return f" ({said}{hint})" if said else ""


def _check_kin(source: DenoiserConfig, target: DenoiserConfig) -> None:
    """Refuse tensors that would fit and mean something else."""
    if source.family != target.family:
        raise UserError(
            f"weights of family {source.family} do not fit a model of family {target.family}:"
            f" set model.family: {source.family}, or name other weights"
        )
    if getattr(source, "hidden_size", 0) != getattr(target, "hidden_size", 0):
        return  # little fits, which is said with its share
    for what in (_heads, _norm):
        if what(source) != what(target):
            field = "norm" if what is _norm else "attention heads"
            raise UserError(
                f"the source has {field} {what(source)}, this model {what(target)}: its weights"
                " would mean something else; set them equal"
            )


def _heads(config: Any) -> Any:
    if config.family == "unet":
        return tuple(config.heads(level) for level in range(len(config.channel_mult)))
    return config.heads


def _norm(config: Any) -> Any:
    return getattr(config, "norm", None)


def _renamed_controls(source: Any, target: Any) -> dict[str, str | None]:
    """Beginnings of the target's names of control layers, and of the source's; None: no such."""
    here, there = _controls(target), _controls(source)
    renamed: dict[str, str | None] = {}
    if target.family == "unet":
        vectors = [
            (config.conditioning.pooled_width, _meanings(config.conditioning.control))
            if config.sdxl_control
            else (config.conditioning.pooled_width, [])
            for config in (target, source)
        ]
        if vectors[0] != vectors[1]:
            renamed["label_emb."] = None
    kinds = {config.conditioning.control_embedding for config in (source, target)}
    if kinds != {"separate"}:
        if len(kinds) > 1 or here != there:
            renamed["control_embedder."] = None
        return renamed
    for k, meaning in enumerate(here):
        other = f"control_embedder.mlps.{there.index(meaning)}." if meaning in there else None
        renamed[f"control_embedder.mlps.{k}."] = other
    return renamed


def _controls(config: Any) -> list[tuple[str, float]]:
    """What the columns of `control_embedder` mean."""
    published = MICRO if getattr(config, "micro_conditions", False) else ()
    return [m for m in _meanings(config.conditioning.control) if m[0] not in published]


def _meanings(controls: Sequence[ControlConfig]) -> list[tuple[str, float]]:
    return [(control.name, control.scale) for control in controls]
