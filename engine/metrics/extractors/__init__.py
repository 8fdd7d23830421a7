"""Frozen networks that turn pictures into features; called by evaluation/extract.py.

An extractor takes uint8 pictures and does all its preprocessing itself, so that real and generated
pictures take exactly the same path. `base.py` says what one writes to add another.
"""

from .base import (
    DTYPES,
    EXTRACTORS,
    FETCHED,
    Backbone,
    Extractor,
    extractor,
    load_extractor,
    preprocessing,
    resize_antialiased,
    taps_by_kind,
    to_channels,
)

__all__ = [
    "DTYPES",
    "EXTRACTORS",
    "FETCHED",
    "Backbone",
    "Extractor",
    "extractor",
    "load_extractor",
    "preprocessing",
    "resize_antialiased",
    "taps_by_kind",
    "to_channels",
]
