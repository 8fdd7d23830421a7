"""Files of weights as others publish them, read for their tensors alone; called by the backbones.

A file is safetensors, or a pickle that holds nothing but tensors. What a network takes of it is
hashed in float32 under the network's own names, so one set of weights in two layouts, or in two
files, is one extractor.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from etude.core.errors import UserError

_PATTERNS = (  # in a folder, the first that is there; parts have numbers behind a hyphen
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "*.safetensors",
    "*.pth",
    "*.pt",
    "*.pth.tar",
)
_COUNTS = "num_batches_tracked"  # of a batch normalisation; has no use here


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> tensor, and the notes of a safetensors file, {} of another.

    Args:
        path: a file, or a folder that holds one, or its parts as transformers writes them.
        what: the network's name, for messages.

    Raises:
        UserError: there is nothing, or something that is not a plain file of weights.
    """
    files = _files(path)
    if not files:
        raise UserError(f"there are no {what} weights at {path}: name a file of weights")
    state: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for file in files:
        found, note = _read(file)
        state |= found
        notes |= note
    for name in ("state_dict", "model"):  # where a training loop puts them
        if isinstance(state.get(name), dict):
            state = state[name]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors: name a file of {what} weights")
    return {name.removeprefix("module."): value for name, value in tensors.items()}, notes


def fill(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, ignored: Sequence[str] = ()
) -> str:
    """Put tensors into a network, made on the meta device; returns their sha256.

    Args:
        state: float tensors under the network's names; counts of batches may be there or not.
        path: where they come from, for messages.
        ignored: what names may begin with that the network has no use for.

    Raises:
        UserError: a tensor is missing, has another shape, or is not known.
    """
    wanted = network.state_dict()
    counts = {name: old for name, old in wanted.items() if name.endswith(_COUNTS)}
    missing = [name for name in wanted if name not in state and name not in counts]
    names = [name for name in wanted if name in state and name not in counts]
    wrong = [name for name in names if state[name].shape != wanted[name].shape]
    odd = [n for n in state if n not in wanted and not n.startswith(tuple(ignored))]
    odd = [name for name in odd if not name.endswith(_COUNTS)]
    for names_of, fault in ((missing, "lacks"), (wrong, "has another shape of"), (odd, "also has")):
        if names_of:
            more = f" and {len(names_of) - 1} more" if len(names_of) > 1 else ""
            raise UserError(
                f"{path} is not a file of these weights: it {fault} {names_of[0]}{more}; name the "
                "right file"
            )
    taken = {name: _wide(state[name].detach()).contiguous() for name in names}
    zeros = {name: torch.zeros((), dtype=torch.int64) for name in counts}
    network.load_state_dict(taken | zeros, assign=True)
    network.requires_grad_(False)
    return tensors_sha256(taken)


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 in hexadecimal over names and bytes, in the names' order."""
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode())
        total.update(state[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def parts(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def renamed(state: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors with beginnings of their names replaced, by the first (old, new) that fits."""
    made = {}
    for name, value in state.items():
        old, new = next((pair for pair in names if name.startswith(pair[0])), ("", ""))
        made[new + name.removeprefix(old)] = value
    return made


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    for pattern in _PATTERNS:
        found = sorted(path.glob(pattern))
        if len(found) > 1 and "-" not in pattern:
            raise UserError(f"{path} holds {len(found)} files of weights: name one of them")
        if found:
            return found
    return []


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {n: opened.get_tensor(n) for n in opened.keys()}, opened.metadata() or {}
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} cannot be read as weights: {reason}") from None
    except Exception as error:  # pickle's own, of a file that holds more than tensors
        raise UserError(f"{file} is not a plain file of weights ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a {type(found).__name__}, not a state dict of weights")
    return found, {}
