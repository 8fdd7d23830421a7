"""A folder of pictures that somebody drew of a data set's prompts, as a plan's candidate.

Called by running.py and before a dry run. Which prompt a picture is of is read from the folder's
`metadata.csv` (`prompt_id`, or `caption`, or `label`), as `etude sample --format png` and others
write it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from etude.core.errors import UserError

from ..datasets import Prompt, Prompts
from ..decoding import Form
from ..picture_set import Pictures, Stages, digest
from ..sets import FolderPictures
from ..text_files import METADATA, read_metadata
from .recipe import PlanRecipe


class PromptedFolder:
    """The first `count` pictures of a folder and their prompts; a `PictureSet`.

    Args:
        form: what brings pictures to the size and channels of the real ones.
    """

    def __init__(self, folder: str | Path, prompts: Prompts, count: int, form: Form) -> None:
        fitted = {"size": form.size, "fit": form.fit, "channels": form.channels}
        self._folder = _first(folder, count, classes=list(prompts.classes) or None, **fitted)
        self.name, self.classes = str(folder), list(prompts.classes)
        self.protocol = self._folder.protocol
        self._asked = _asked(Path(folder), prompts)
        ids = [self._asked[file].id for file in self._folder.files] if self._asked else []
        parts = ["prompted", self._folder.fingerprint, prompts.fingerprint, ids]
        self.fingerprint = digest(parts)

    def __len__(self) -> int:
        return len(self._folder)

    def read(self, start: int, stop: int, stages: Stages) -> Pictures:
        """Pictures start to stop, with groups and classes of their prompts where known."""
        found = self._folder.read(start, stop, stages)
        if not self._asked:
            return found
        asked = self.asked(start, stop)
        labels = np.array([prompt.label for prompt in asked], np.int64)
        return Pictures(found.images, found.keys, labels, [prompt.group for prompt in asked])

    @property
    def knows_prompts(self) -> bool:
        """Whether the folder says what each picture was drawn of."""
        return bool(self._asked)

    def asked(self, start: int, stop: int) -> list[Prompt]:
        """The prompts of pictures start to stop.

        Raises:
            UserError: the folder says of no picture what it was drawn of.
        """
        if not self._asked:
            raise UserError(
                f"{self.name}/metadata.csv does not say what each picture was drawn of: give it the"
                " columns file_name and prompt_id, or caption"
            )
        return [self._asked[file] for file in self._folder.files[start:stop]]


def check_folders(recipe: PlanRecipe) -> None:
    """Raise where a folder of the plan's is not there or has too few pictures.

    Called, as `check_prompts`, before anything is drawn: else the fault of the last model costs the
    work of the others.
    """
    for name, model in recipe.models.items():
        if model.kind == "pictures":
            try:
                _first(model.source, recipe.samples)
            except UserError as error:
                raise UserError(f"models.{name}.source: {error}") from None


def check_prompts(recipe: PlanRecipe, prompts: Iterable[Prompts]) -> None:
    """Raise where a folder of the plan's names prompts that one of the data sets does not have."""
    for name, model in recipe.models.items():
        for asked in prompts if model.kind == "pictures" else ():
            try:
                _asked(Path(model.source), asked)
            except UserError as error:
                raise UserError(f"models.{name}: {error}") from None


def _first(folder: str | Path, count: int, **options: Any) -> FolderPictures:
    """The first `count` pictures of a folder."""
    found = FolderPictures(folder, limit=count, **options)
    if len(found) < count:
        raise UserError(
            f"{folder} holds {len(found)} pictures and the plan asks for {count}; set"
            f" samples={len(found)}, or draw more"
        )
    return found


def _asked(folder: Path, prompts: Prompts) -> dict[str, Prompt]:
    """Picture's key -> its prompt; empty where the folder says of no picture."""
    path = folder / METADATA
    by_id = {prompt.id: prompt for prompt in prompts.prompts}
    by_text: dict[str, Prompt] = {}
    unclear: set[str] = set()
    for prompt in prompts.prompts:
        text = prompt.text or _class(prompts, prompt)
        same = by_text.setdefault(text, prompt)
        if text and (same.group, same.label) != (prompt.group, prompt.label):
            unclear.add(text)
    found: dict[str, Prompt] = {}
    silent = ""
    for name, row in read_metadata(folder).items():
        if row.get("prompt_id"):
            prompt = by_id.get(row["prompt_id"])
        else:
            text = row.get("caption", "").strip() or row.get("label", "")
            if text in unclear:
                raise UserError(
                    f"{path}: {prompts.name} has {text!r} in several groups; give a column"
                    " prompt_id"
                )
            prompt = by_text.get(text) if text else None
        if prompt is not None:
            found[name] = prompt
            continue
        said = row.get("prompt_id") or row.get("caption")
        if not said and prompts.classes:
            said = row.get("label")
        if said:
            raise UserError(
                f"{path}: {name} was drawn of {said!r}, which is none of the"
                f" {len(prompts):,} prompts that the plan takes of {prompts.name}"
            )
        silent = silent or name
    if found and silent:
        raise UserError(
            f"{path} does not say what {silent} was drawn of and says it of others; fill in its"
            " prompt_id, caption or label, or leave its row out"
        )
    return found


def _class(prompts: Prompts, prompt: Prompt) -> str:
    """The class's name, for a prompt that asks for a class alone."""
    return prompts.classes[prompt.label] if 0 <= prompt.label < len(prompts.classes) else ""
