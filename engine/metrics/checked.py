"""What every function of features asks of them and of its options, in one sentence.

Called by the metrics' functions. Numbers that are not finite, as float16 overflows to, turn into
plausible figures: nothing is near a row of them, so a precision is merely lower.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from etude.core.config import Config
from etude.core.errors import UserError

C = TypeVar("C", bound=Config)


def check_features(least: int = 1, **sides: torch.Tensor) -> None:
    """Raise where features cannot be measured.

    Args:
        least: the fewest rows of a side.
        sides: name of a side -> its features, which must be (rows, dimensions) of a floating dtype,
            finite, without gradients, and of one width and device on all sides.

    Raises:
        UserError: they are not; the message names the side and the first row at fault.
    """
    for side, features in sides.items():
        if not isinstance(features, torch.Tensor):
            kind = type(features).__name__
            raise UserError(f"{side} features must be a tensor, got {kind}; torch.from_numpy helps")
        if features.dim() != 2 or not features.is_floating_point():
            raise UserError(
                f"{side} features must be (rows, dimensions) of a floating dtype, got "
                f"{(*features.shape,)} {features.dtype}"
            )
        if features.requires_grad:  # a figure has none, and what is kept of them would hold a graph
            raise UserError(f"{side} features have gradients; give features.detach()")
        if len(features) < least:
            rows = "row" if least == 1 else "rows"
            raise UserError(f"{side} features need {least} {rows}, got {len(features)}")
    check_alike(**sides)
    for side, features in sides.items():
        finite = features.isfinite().all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise UserError(
                f"row {row} of the {side} features is not finite: look for what the network "
                "overflows on, or extract in float32"
            )


def check_alike(**sides: torch.Tensor) -> None:
    """Raise `UserError` unless features, or their means, are of one width and on one device."""
    known = list(sides.items())
    for (one, first), (other, features) in zip(known, known[1:], strict=False):
        a, b = first.shape[-1], features.shape[-1]
        if a != b:
            raise UserError(
                f"{one} features have {a} dimensions and {other} ones {b}; take both from one "
                "extractor"
            )
        if first.device != features.device:
            raise UserError(
                f"{one} features are on {first.device} and {other} ones on {features.device}; "
                f"move one with .to({str(first.device)!r})"
            )


def options_of(made: type[C], name: str, given: Mapping[str, Any]) -> C:
    """Options of a metric or scorer from plain values.

    Args:
        name: what has them, as messages say it.

    Raises:
        UserError: one is wrong, unknown or missing.
    """
    try:
        return made(**given)
    except ValidationError as error:
        # An unknown name first: it may be what is missing, misspelt.
        first = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")[0]
        place = ".".join(map(str, (name, *first["loc"])))
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = f"there is no such option; {name} has {', '.join(made.model_fields)}"
        elif first["type"] == "missing":
            said = f"set it, as options: {{{first['loc'][-1]}: ...}}"
        elif first["type"] != "value_error":
            said = f"{said}, got {first['input']!r}"
        raise UserError(f"{place}: {said}") from None
