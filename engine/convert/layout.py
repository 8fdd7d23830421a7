"""One table between two state dicts, applied in either direction; called by the family files.

A table is a list of `Entry`. `to_ours` and `to_theirs` are strict: every name must be met, every
shape must fit, and a report of what does not names the nearest names on the other side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from etude.core.errors import UserError
from etude.core.recipe_tree import nearest
from etude.models.conditioning import ConditioningConfig
from etude.models.denoiser import TransformerConfig

How = Literal["same", "stack", "copies", "swap"]
REPORTED = 8  # names listed in a report before it says how many more there are


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and where it lives over there.

    Attributes:
        ours: our name; "" for a tensor that only they have, which `make` writes.
        theirs: their names: one, or several for `stack` and `copies`; none for a tensor that only
            we have, which `make` gives when read and which is not written.
        how: same: equal; stack: theirs one after another along dimension 0 (a fused query, key and
            value); copies: each of theirs equals ours; swap: the halves of dimension 0 exchanged
            (shift and scale in the other order).
        shape: their shape where it differs from ours by ones or by order of flattening.
        make: the tensor of the side that has it alone; theirs is compared when read.
    """

    ours: str
    theirs: tuple[str, ...]
    how: How = "same"
    shape: tuple[int, ...] | None = None
    make: Callable[[], Tensor] | None = None


def same(ours: str, theirs: str, *kinds: str) -> list[Entry]:
    """Entries of a module's tensors, weight and bias unless `kinds` names others."""
    return [Entry(f"{ours}.{k}", (f"{theirs}.{k}",)) for k in kinds or ("weight", "bias")]


def stack(ours: str, theirs: Sequence[str], *kinds: str) -> list[Entry]:
    """Entries of one module of ours that several of theirs make together, in order."""
    return [
        Entry(f"{ours}.{k}", tuple(f"{name}.{k}" for name in theirs), "stack")
        for k in kinds or ("weight", "bias")
    ]


def null_text(asked: ConditioningConfig) -> list[Entry]:
    """The null text of `TextTokens`, which only we keep: zeros."""
    if asked.semantic != "text":
        return []
    make = partial(torch.zeros, asked.text_tokens, asked.text_width)
    return [Entry("text_tokens.null", (), make=make)]


def published_mlp(config: TransformerConfig) -> None:
    """Refuse an mlp_ratio that diffusers' class of the family cannot be told.

    Raises:
        UserError: it is not 4.
    """
    if config.mlp_ratio != 4:
        raise UserError(
            f"diffusers' {config.family} has mlp_ratio 4: this model has {config.mlp_ratio:g};"
            " write layout: original"
        )


def to_ours(
    theirs: Mapping[str, Tensor], table: Sequence[Entry], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Our state dict from theirs.

    Args:
        theirs: their tensors by name.
        table: which is which.
        shapes: our names and shapes, as `{k: v.shape for k, v in model.state_dict().items()}`.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or copies of one differ.
    """
    known = [name for entry in table for name in entry.theirs]
    _compare(known, list(theirs), "the checkpoint", "this layout")
    found = {}
    for entry in table:
        if not entry.theirs:
            assert entry.make is not None
            found[entry.ours] = entry.make()
            continue
        parts = [theirs[name] for name in entry.theirs]
        if not entry.ours:
            assert entry.make is not None
            _equal(entry, parts[0], entry.make())
            continue
        if entry.how == "copies":
            for name, part in zip(entry.theirs[1:], parts[1:], strict=True):
                if not torch.equal(part, parts[0]):
                    raise UserError(f"{name} differs from {entry.theirs[0]}, of which it is a copy")
        value = torch.cat(parts) if entry.how == "stack" else parts[0]
        value = _swapped(value) if entry.how == "swap" else value
        shape = shapes.get(entry.ours, value.shape)
        if entry.shape is not None and tuple(value.shape) == entry.shape:
            value = value.reshape(shape)
        if value.shape != shape:
            raise UserError(
                f"{entry.theirs[0]} has shape {tuple(value.shape)} where {entry.ours} needs"
                f" {tuple(shape)}: the model's fields must be those of the checkpoint"
            )
        found[entry.ours] = value
    _compare(list(shapes), list(found), "the table", "this model")
    return found


def to_theirs(ours: Mapping[str, Tensor], table: Sequence[Entry]) -> dict[str, Tensor]:
    """Their state dict from ours, every tensor contiguous and apart from every other."""
    _compare([entry.ours for entry in table if entry.ours], list(ours), "the model", "this layout")
    found = {}
    for entry in table:
        if not entry.ours:
            assert entry.make is not None
            found[entry.theirs[0]] = entry.make()
            continue
        value = ours[entry.ours]
        value = _swapped(value) if entry.how == "swap" else value
        split = len(entry.theirs) if entry.how == "stack" else 1
        parts = value.chunk(split) if split > 1 else [value] * len(entry.theirs)
        for name, part in zip(entry.theirs, parts, strict=True):
            found[name] = part.reshape(entry.shape or part.shape).clone().contiguous()
    return found


def difference(expected: Sequence[str], given: Sequence[str]) -> list[str]:
    """Lines that say what is missing and what is unknown, each with the nearest name."""
    missing = [name for name in expected if name not in set(given)]
    unknown = [name for name in given if name not in set(expected)]
    lines = []
    for word, names, others in (("missing", missing, unknown), ("unknown", unknown, missing)):
        for name in names[:REPORTED]:
            near = nearest(name, others)
            lines.append(f"{word} {name}" + (f" (nearest: {near})" if near else ""))
        if len(names) > REPORTED:
            lines.append(f"{word}: {len(names) - REPORTED} more")
    return lines


def _compare(expected: Sequence[str], given: Sequence[str], what: str, other: str) -> None:
    lines = difference(expected, given)
    if lines:
        raise UserError(f"{what} does not fit {other}: " + "; ".join(lines))


def _equal(entry: Entry, given: Tensor, made: Tensor) -> None:
    fits = given.shape == made.shape and torch.allclose(given.to(made), made, rtol=0, atol=1e-5)
    if not fits:
        raise UserError(
            f"{entry.theirs[0]} is not what this model computes: the model's fields must be those"
            " of the checkpoint"
        )


def _swapped(value: Tensor) -> Tensor:
    first, second = value.chunk(2)
    return torch.cat((second, first))
