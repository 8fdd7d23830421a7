"""Weights of a denoiser in files of other projects: read with the layout found, or written in one.

Called by sampling of published checkpoints and by transfer. A file is safetensors, or a pickle that
is opened with `weights_only`; published pickles nest the weights under "ema", "state_dict" or
"model", the average first.
"""

import contextlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from etude.core.errors import UserError
from etude.models.families import build_denoiser

from . import dit, mdt, mmdit, pixart, unet
from .layout import Entry, to_ours, to_theirs

Table = Callable[[Any], list[Entry]]
# Layouts of a family beside our own names, which are those of the family's own repository unless
# it has another "original" here.
LAYOUTS: dict[str, dict[str, Table]] = {
    "dit": {"diffusers": dit.diffusers_table},
    "mdt": {"original": mdt.original_table},
    "mmdit": {"original": mmdit.original_table, "diffusers": mmdit.diffusers_table},
    "pixart": {"diffusers": pixart.diffusers_table},
    "unet": {"original": unet.original_table, "diffusers": unet.diffusers_table},
}
_NESTS = ("ema", "state_dict", "model", "module")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def read_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; nothing in it is executed.

    Raises:
        UserError: not a weights file, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not a weights file: name one ending in {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} could not be read ({reason}): copy it again") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than tensors: save its state dict alone") from None
    while isinstance(found, dict) and not _is_state(found):
        inner = next((found[name] for name in _NESTS if isinstance(found.get(name), dict)), None)
        if inner is None:
            raise UserError(f"{path} holds no state dict: save the network's state_dict() alone")
        found = inner
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no state dict: save the network's state_dict() alone")
    return found


def weights_files(folder: str | Path) -> list[Path]:
    """The weights files that lie in a folder, by name."""
    return sorted(p for p in Path(folder).iterdir() if p.is_file() and p.suffix in SUFFIXES)


def weights_file(path: str | Path) -> Path:
    """The path itself, or the one weights file of a folder.

    Raises:
        UserError: the folder holds none, or several.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    files = weights_files(path)
    if len(files) != 1:
        held = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"{path} holds {held} where one weights file should be: keep one, or name it"
        )
    return files[0]


def read_denoiser(path: str | Path, config: Any) -> tuple[dict[str, Tensor], str]:
    """A denoiser's weights in our names, and the layout that they were found in.

    Args:
        path: a weights file, or a folder of diffusers with one.
        config: the model's configuration; every tensor must be there and fit.

    Raises:
        UserError: what is missing, unknown or of another shape, with the nearest names.
    """
    theirs = read_file(weights_file(path))
    # One published file may hold the autoencoder and the text encoders too.
    if config.family == "mmdit" and any(name.startswith(mmdit.PREFIX) for name in theirs):
        length = len(mmdit.PREFIX)
        theirs = {k[length:]: v for k, v in theirs.items() if k.startswith(mmdit.PREFIX)}
    if config.family == "unet" and any(name.startswith(unet.PUBLISHED[0]) for name in theirs):
        kept = (*unet.PUBLISHED, *unet.OURS)
        theirs = {name: tensor for name, tensor in theirs.items() if name.startswith(kept)}
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in build_denoiser(config).state_dict().items()}
    layouts = {"ours": [Entry(name, (name,)) for name in shapes]}
    for name, table in LAYOUTS[config.family].items():
        with contextlib.suppress(UserError):  # a layout that cannot hold such a model
            layouts[name] = table(config)

    def unmet(layout: str) -> int:
        return len({name for entry in layouts[layout] for name in entry.theirs} ^ set(theirs))

    name = min(layouts, key=unmet)
    if pixart.NULL in theirs:
        layouts[name] = pixart.with_null(layouts[name])
    if name == "ours" and "original" not in layouts:
        return to_ours(theirs, layouts[name], shapes), "original"
    return to_ours(theirs, layouts[name], shapes), name


def write_denoiser(
    state: Mapping[str, Tensor], config: Any, path: str | Path, *, layout: str = "original"
) -> Path:
    """Write a denoiser's weights as safetensors in another project's layout.

    Args:
        state: our names; must be whole.
        layout: "original" (the family's own repository) or "diffusers".
    """
    tables = LAYOUTS[config.family]
    if layout not in ("original", *tables):
        known = ", ".join(dict.fromkeys(("original", *tables)))
        raise UserError(f"family {config.family} has no layout {layout!r}: give one of {known}")
    table = tables.get(layout, lambda config: [Entry(name, (name,)) for name in state])
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(to_theirs(state, pixart.with_null(table(config))), partial)
    partial.rename(path)
    return path


def _is_state(found: dict) -> bool:
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())
