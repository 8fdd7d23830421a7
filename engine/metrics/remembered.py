"""What was made of a tensor, kept as long as the tensor lives; called by the metrics.

One real set is compared with many generated ones, and several metrics look at one batch of
pictures. What depends on the first alone is made once: as long as the same tensor object is handed
in, unchanged, it is found again. Nothing keeps the tensor itself alive. Changes that torch does not
see, such as those of a numpy array that shares the memory, are not seen here either.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T")
_kept: dict[int, tuple[int, dict[Hashable, object]]] = {}  # by id: version, and what was made


def remember(tensor: torch.Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, or what it gave before for this tensor and `key`.

    Args:
        key: says what is made and with which options. What was made of a tensor that has been
            written to since is dropped.
    """
    if tensor.is_inference():  # torch does not count its changes
        return make()
    name, version = id(tensor), tensor._version
    if name not in _kept:
        weakref.finalize(tensor, _kept.pop, name, None).atexit = False
    if name not in _kept or _kept[name][0] != version:
        _kept[name] = (version, {})
    made = _kept[name][1]
    if key not in made:
        made[key] = make()
    return made[key]
