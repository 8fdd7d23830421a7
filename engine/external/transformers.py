"""Text encoders of the transformers library: the only file of the engine that imports it.

Called by `texts.py`. A folder holds a configuration, weights and a tokenizer, as transformers
writes them; in a diffusers pipeline the tokenizer lies beside it (`text_encoder_2`, `tokenizer_2`).
Nothing here reaches the network: a folder is read from disk or refused.

Token features are the last hidden states, after the encoder's final norm, or the last but one,
without it (Stable Diffusion XL and 3 take that one of CLIP). The pooled vector is CLIP's at the end
of the text, projected where the model has a projection, and the mean over a text's own tokens for
T5 and BERT (Reimers and Gurevych 2019).
"""

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from etude.core.errors import UserError

Kind = Literal["clip", "t5", "bert"]
Layer = Literal["last", "penultimate"]
KINDS: dict[str, Kind] = {
    "clip_text_model": "clip",
    "clip": "clip",
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
    "bert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "mpnet": "bert",
}
_T5_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_OFFSET = {"roberta": 2, "xlm-roberta": 2, "mpnet": 2}  # positions that no token ever has
_PROJECTED = ("CLIPTextModelWithProjection", "CLIPModel")
_HALF = ".fp16."  # in the name of a file with a half-precision variant of the weights
_WEIGHTS = (
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
)
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Of these, what knows the words: without one transformers makes a tokenizer that knows none.
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", *_TOKENIZER[-2:])


# transformers replaces functions of its own while it reads a model: two threads at once would leave
# them replaced, and later models with weights untied.
_READING = threading.Lock()


class Encoded(NamedTuple):
    """Texts as features.

    Attributes:
        tokens: (n, L, width), zero behind a text's end where padding was masked.
        lengths: (n,) int64, tokens of each text with its start and end marks; L where padding
            was not masked.
        pooled: (n, pooled_width).
    """

    tokens: Tensor
    lengths: Tensor
    pooled: Tensor


class TextEncoder:
    """One text encoder; its weights are read when the first text is encoded.

    Attributes:
        kind: "clip", "t5" or "bert".
        width, pooled_width: channels of a token and of the pooled vector.
        limit: the most tokens that it reads, 0 for any number.
    """

    def __init__(
        self,
        folder: Path,
        stated: dict[str, Any],
        kind: Kind,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """See `from_folder`; `stated` is the content of config.json."""
        self.folder, self.kind, self.dtype, self.device = folder, kind, dtype, device
        self._type = stated["model_type"]
        self.projected = kind == "clip" and any(
            name in _PROJECTED for name in stated.get("architectures") or ()
        )
        config = _read(folder, self._config_class)
        self.width = config.d_model if kind == "t5" else config.hidden_size
        self.pooled_width = config.projection_dim if self.projected else self.width
        self.limit = 0
        if kind != "t5":
            self.limit = config.max_position_embeddings - _OFFSET.get(self._type, 0)
        self._network: nn.Module | None = None
        self._tokenizer: Any = None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        kind: Literal["auto"] | Kind = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "TextEncoder":
        """A trained text encoder from a local folder.

        Args:
            kind: refuse a folder of another kind; "auto" takes any.
            dtype: of weights and features.

        Raises:
            UserError: the folder is missing, lacks weights or tokenizer, or is no text encoder's.
        """
        folder = Path(folder)
        stated = _stated(folder)
        found = KINDS.get(stated.get("model_type", ""))
        if found is None or kind not in ("auto", found):
            wanted = "a text encoder (CLIP, T5 or BERT)" if kind == "auto" else f"of kind {kind}"
            raise UserError(
                f"{folder / 'config.json'} describes {stated.get('model_type', 'nothing')!r},"
                f" which is not {wanted}: name such an encoder's folder"
            )
        if not _weights(folder):
            raise UserError(f"{folder} holds no weights: put {_WEIGHTS[0]} beside its config.json")
        encoder = cls(folder, stated, found, dtype, torch.device(device))
        if not any((encoder._tokenizer_folder / name).is_file() for name in _VOCABULARY):
            raise UserError(
                f"{folder} holds no tokenizer: put {_VOCABULARY[0]} beside its config.json"
            )
        return encoder

    @property
    def identity(self) -> str:
        """sha256 over weights, configuration and tokenizer, which caches are keyed by."""
        beside = self._tokenizer_folder
        paths = [self.folder / "config.json", *_weights(self.folder)]
        paths += [beside / name for name in _TOKENIZER if (beside / name).is_file()]
        digest = hashlib.sha256()
        for path in paths:
            with open(path, "rb") as file:
                digest.update(
                    f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()};".encode()
                )
        return digest.hexdigest()

    @torch.no_grad()
    def encode(
        self,
        captions: Sequence[str],
        max_tokens: int,
        *,
        layer: Layer = "last",
        masked: bool = True,
    ) -> Encoded:
        """Features of n texts, each cut or padded to `max_tokens`, its end mark kept.

        Args:
            masked: attend to a text's own tokens alone; without it padding is text, as in
                Stable Diffusion 3.

        Raises:
            UserError: more tokens than the encoder reads.
        """
        if self.limit and max_tokens > self.limit:
            raise UserError(
                f"{self.folder} reads at most {self.limit} tokens, not {max_tokens}: set"
                f" text.max_tokens={self.limit}"
            )
        self._load()
        tokenised = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        )
        own = tokenised["attention_mask"].to(self.device)
        asked = {"input_ids": tokenised["input_ids"].to(self.device)}
        asked |= {"attention_mask": own} if masked else {}
        out = self._network(**asked, output_hidden_states=layer == "penultimate", return_dict=True)
        tokens = out.last_hidden_state if layer == "last" else out.hidden_states[-2]
        lengths = own.sum(1)
        if self.kind == "clip":
            pooled = out.text_embeds if self.projected else out.pooler_output
        else:
            share = own[:, :, None] / lengths.clamp(min=1)[:, None, None]
            pooled = (out.last_hidden_state.float() * share).sum(1).to(self.dtype)
        if masked:
            tokens = tokens.masked_fill(own[:, :, None] == 0, 0.0)
        else:
            lengths = torch.full_like(lengths, max_tokens)
        return Encoded(tokens, lengths, pooled)

    def release(self) -> None:
        """Forget the weights; the next text reads them again."""
        self._network = None

    @property
    def _config_class(self) -> str:
        return "CLIPTextConfig" if self.kind == "clip" else "AutoConfig"

    @property
    def _network_class(self) -> str:
        if self.kind == "clip":
            return "CLIPTextModelWithProjection" if self.projected else "CLIPTextModel"
        return _T5_CLASSES[self._type] if self.kind == "t5" else "AutoModel"

    @property
    def _tokenizer_folder(self) -> Path:
        """The folder itself, or the one beside it in a diffusers pipeline."""
        beside = self.folder.with_name(self.folder.name.replace("text_encoder", "tokenizer"))
        here = any((self.folder / name).is_file() for name in _VOCABULARY)
        return self.folder if here or not beside.is_dir() else beside

    def _load(self) -> None:
        if self._network is not None:
            return
        if self._tokenizer is None:
            self._tokenizer = _read(self._tokenizer_folder, "AutoTokenizer")
            self._tokenizer.padding_side = self._tokenizer.truncation_side = "right"
        half = _HALF in _weights(self.folder)[0].name
        network, info = _read(
            self.folder,
            self._network_class,
            dtype=self.dtype,
            variant="fp16" if half else None,
            output_loading_info=True,
        )
        missing = sorted(n for n in info["missing_keys"] if not n.startswith("pooler."))
        if missing:
            raise UserError(
                f"the weights in {self.folder} lack {missing[0]} and {len(missing) - 1} more:"
                " copy the folder again"
            )
        self._network = network.to(self.device).eval().requires_grad_(False)


def _read(folder: Path, name: str, **options: Any) -> Any:
    """`transformers.<name>.from_pretrained` of a local folder; its failures are one sentence."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"reading {folder} needs the transformers library: pip install 'transformers>=5.12'"
        ) from error
    with _READING:
        shown = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            kind = getattr(transformers, name)
            return kind.from_pretrained(str(folder), local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{folder} could not be read as {name} of transformers ({reason}): copy the folder"
                " again"
            ) from error
        finally:
            transformers.logging.set_verbosity(shown[0])
            if shown[1]:
                transformers.logging.enable_progress_bar()


def _weights(folder: Path) -> list[Path]:
    return next((sorted(found) for name in _WEIGHTS if (found := [*folder.glob(name)])), [])


def _stated(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: name a folder with a model's config.json")
    try:
        stated = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): copy the folder again") from error
    return stated if isinstance(stated, dict) else {}
