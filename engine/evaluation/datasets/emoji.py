"""Emoji by skin tone and flags by region: the grouped sets that `etude data fetch` brings.

`data/emoji` holds the splits `train` and `test` as shards, a caption per picture, keys that are
code points ("1f44b-1f3fd", a waving hand of medium tone). Each toned emoji is there in all five
tones, so the groups are balanced and paired: 277 of each tone in `train`, 27 in `test`.
`data/flags` holds the flags of the world's countries as shards, each one's class being its region.
"""

from pathlib import Path

from etude.core.errors import UserError
from etude.data.emoji import emoji_tone

from . import data_set
from .generic import Shards

_TONELESS = {"none", "mixed"}


@data_set("emoji")
class Emoji(Shards):
    """Emoji with their captions; the group is the skin tone, "" for those without one.

    Args:
        folder: `data/emoji`.
        split: "test", which no recipe trains on, or "train".
        toned: only the pictures that have a skin tone.
    """

    name, grouped = "emoji", True

    def __init__(self, folder: str | Path, *, split: str = "test", toned: bool = False) -> None:
        if not (Path(folder) / split).is_dir():
            raise UserError(
                f"{self.name}: {folder} has no folder {split}; type: etude data fetch emoji"
            )
        super().__init__(Path(folder) / split)
        self._toned = toned

    def rows(self) -> list[int] | None:
        """Numbers of the samples that are the set; None for all as stored."""
        if not self._toned:
            return None
        keys = (self._shards.key_of(i) for i in range(len(self._shards)))
        return [i for i, key in enumerate(keys) if emoji_tone(key) not in _TONELESS]

    def group(self, key: str, label: int) -> str:
        """The skin tone, light to dark."""
        tone = emoji_tone(key)
        return "" if tone in _TONELESS else tone


@data_set("flags")
class Flags(Shards):
    """Flags of countries with captions ("the flag of Kenya"); the group is the country's region.

    Args:
        folder: `data/flags`.
    """

    name = "flags"

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise UserError(f"{self.name}: {folder} is not there; type: etude data fetch flags")
        super().__init__(folder)
