"""What every function of features asks of them, in one sentence; called by the metrics' functions.

Numbers that are not finite, as float16 overflows to, turn into plausible figures: nothing is near a
row of them, so a precision is merely lower.
"""

import torch

from etude.core.errors import UserError


def check_features(least: int = 1, **sides: torch.Tensor) -> None:
    """Raise where features cannot be measured.

    Args:
        least: the fewest rows of a side.
        sides: name of a side -> its features, which must be (rows, dimensions) of a floating dtype,
            finite, and of one width on all sides.

    Raises:
        UserError: they are not; the message names the side and the first row at fault.
    """
    width: dict[int, str] = {}
    for side, features in sides.items():
        if not isinstance(features, torch.Tensor):
            kind = type(features).__name__
            raise UserError(f"{side} features must be a tensor, got {kind}; torch.from_numpy helps")
        if features.dim() != 2 or not features.is_floating_point():
            raise UserError(
                f"{side} features must be (rows, dimensions) of a floating dtype, got "
                f"{(*features.shape,)} {features.dtype}"
            )
        if len(features) < least:
            rows = "row" if least == 1 else "rows"
            raise UserError(f"{side} features need {least} {rows}, got {len(features)}")
        finite = features.isfinite().all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise UserError(
                f"row {row} of the {side} features is not finite: look for what the network "
                "overflows on, or extract in float32"
            )
        width.setdefault(features.shape[1], side)
    if len(width) > 1:
        (a, one), (b, other) = list(width.items())[:2]
        raise UserError(
            f"{one} features have {a} dimensions and {other} ones {b}; take both from one extractor"
        )
