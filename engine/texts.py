"""From captions to what a text-conditional denoiser is asked by; called by training and sampling.

One encoder gives its tokens and their number. Several are joined as in Stable Diffusion 3 (Esser et
al. 2024): the channels of the CLIP encoders side by side, filled with zeros to the width of the
others, whose tokens follow; the CLIPs' pooled vectors side by side. In a joint the padding is text
for CLIP and T5, and every token is attended to.

    text    [ CLIP-L | CLIP-G | 0 ]      tokens of CLIP
            [          T5         ]      tokens of T5
    pooled  [ CLIP-L | CLIP-G ]

Features are computed once for every caption, before training, and read from files by their text.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.log import Log
from etude.data.shards import ShardSet
from etude.data.text_cache import TextCache, keyed, write_texts
from etude.external.transformers import Encoded, TextEncoder

from .models.conditioning import ConditioningConfig

BATCH = 32  # texts encoded together
PER_FILE = 1024  # texts of a file, at most
_FILE_NUMBERS = 1 << 27  # numbers of a file, at most: they are in memory while it is written
_REMEMBERED = 1 << 28  # numbers of texts outside the cache that are kept in memory (1 GiB)


class TextConfig(Config):
    """What turns captions into features."""

    encoders: list[str] = option([], "folders of text encoders; several are joined (SD3)")
    max_tokens: int = option(77, "tokens of a caption, with its marks", unit="tokens", gt=0)
    layer: Literal["last", "penultimate"] = option(
        "last", "which hidden states of CLIP are its tokens; T5 and BERT always give their last"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of the encoders and of what is stored"
    )
    ahead: bool = option(
        True, "encode all captions before training; false: each batch's", affects_result=False
    )
    folder: str = option("data/text", "where caches live, each under its key", affects_result=False)


class JointEncoder:
    """One text encoder, or several joined.

    Attributes:
        tokens, width, pooled_width: shape of the features.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        dtype = getattr(torch, config.dtype)
        self.config = config
        self.encoders = [
            TextEncoder.from_folder(folder, dtype=dtype, device=device)
            for folder in config.encoders
        ]
        self.clips = [e for e in self.encoders if e.kind == "clip"]
        self.others = [e for e in self.encoders if e.kind != "clip"]
        if config.layer == "penultimate" and not self.clips:
            raise UserError("text.layer: penultimate is for CLIP encoders: set text.layer=last")
        self.joined = len(self.encoders) > 1
        self.clip_tokens = config.max_tokens
        if self.joined and self.clips:
            self.clip_tokens = min([config.max_tokens, *(e.limit for e in self.clips)])
        for encoder in self.encoders:
            if encoder.limit and self._length(encoder) > encoder.limit:
                raise UserError(
                    f"{encoder.folder} reads at most {encoder.limit} tokens: set"
                    f" text.max_tokens={encoder.limit}"
                )
        beside = sum(encoder.width for encoder in self.clips)
        self.width = max([beside, *(encoder.width for encoder in self.others)])
        self.tokens = (self.clip_tokens if self.clips else 0) + config.max_tokens * len(self.others)
        self.pooled_width = sum(e.pooled_width for e in self.clips or self.others)
        plan = config.model_dump(include={"max_tokens", "layer", "dtype"})
        self.plan = keyed({"encoders": [encoder.identity for encoder in self.encoders]} | plan)

    def encode(self, captions: Sequence[str]) -> Encoded:
        """Features of n texts, on the encoders' device."""
        clips = [self._encode(encoder, captions) for encoder in self.clips]
        others = [self._encode(encoder, captions) for encoder in self.others]
        if not self.joined:
            return (clips or others)[0]
        beside = [torch.cat([clip.tokens for clip in clips], dim=2)] if clips else []
        parts = [*beside, *(other.tokens for other in others)]
        parts = [torch.nn.functional.pad(p, (0, self.width - p.shape[2])) for p in parts]
        tokens = torch.cat(parts, dim=1)
        lengths = torch.full((len(captions),), tokens.shape[1], device=tokens.device)
        return Encoded(tokens, lengths, torch.cat([e.pooled for e in clips or others], dim=1))

    def release(self) -> None:
        """Forget the weights; the next text reads them again."""
        for encoder in self.encoders:
            encoder.release()

    def _length(self, encoder: TextEncoder) -> int:
        return self.clip_tokens if encoder.kind == "clip" else self.config.max_tokens

    def _encode(self, encoder: TextEncoder, captions: Sequence[str]) -> Encoded:
        layer = self.config.layer if encoder.kind == "clip" else "last"
        # BERT never sees padding while it is trained; CLIP and T5 do in the joint.
        masked = not self.joined or encoder.kind == "bert"
        return encoder.encode(captions, self._length(encoder), layer=layer, masked=masked)


class TextFeatures:
    """Captions to features, from files where they are there and by the encoders where not.

    Attributes:
        key: sha256 over encoders, precision, length and layer.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        self.encoder = JointEncoder(config, device)
        self.key = self.encoder.plan["key"]
        self.folder = Path(config.folder) / self.key[:16]
        self._cache: TextCache | None = None
        self._remembered: dict[str, tuple[Tensor, Tensor]] = {}
        self._lock = threading.Lock()  # a batch's thread and an evaluation may ask at once

    def check(self, conditioning: ConditioningConfig, name: str) -> None:
        """The model must take these features; says which fields to set.

        Raises:
            UserError: a width or the number of tokens differs.
        """
        wanted = {"text_tokens": self.encoder.tokens, "text_width": self.encoder.width}
        if conditioning.pooled_width:
            wanted["pooled_width"] = self.encoder.pooled_width
        wrong = [
            f"model.conditioning.{field}={value}"
            for field, value in wanted.items()
            if getattr(conditioning, field) != value
        ]
        if wrong:
            raise UserError(f"recipe {name} does not fit its text encoders: set {' '.join(wrong)}")

    def prepare(
        self,
        captions: Iterable[str],
        *,
        log: Log | None = None,
        rank: int = 0,
        world: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Encode what the cache lacks; what is written stays, so an interrupted call goes on.

        Process `rank` of `world` encodes every `world`-th file; when all have returned, `complete`
        reads what the others wrote.

        Args:
            check: called between batches; what it raises ends the call.
        """
        unique = sorted(set(captions))
        cache = TextCache(self.folder, self.encoder.plan)
        count = min(PER_FILE, max(1, _FILE_NUMBERS // (self.encoder.tokens * self.encoder.width)))
        for start in range(rank * count, len(unique), world * count):
            chunk = unique[start : start + count]
            here = cache.has(chunk)
            lacking = [caption for caption, found in zip(chunk, here, strict=True) if not found]
            if not lacking:
                continue
            tokens, pooled = self._encode(lacking, check)
            write_texts(self.folder, self.key, lacking, tokens, torch.stack(pooled))
            if log is not None:
                done = min(start + count, len(unique))
                log.info(f"captions: {done:,} of {len(unique):,} different ones are encoded")
        self.encoder.release()

    def complete(self, captions: Iterable[str]) -> int:
        """Open the cache after every process has prepared it; the number of different captions.

        Raises:
            UserError: a caption is missing.
        """
        self._cache = TextCache(self.folder, self.encoder.plan)
        unique = sorted(set(captions))
        missing = len(unique) - int(self._cache.has(unique).sum())
        if missing:
            raise UserError(
                f"{self.folder} lacks {missing} captions although they were encoded: give all"
                " processes one text.folder that they share"
            )
        return len(unique)

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """text (n, L, d) float32, zero behind each text's end, text_lengths (n,), pooled (n, p)."""
        with self._lock:
            rows = self._rows(captions)
        shape = (len(captions), self.encoder.tokens, self.encoder.width)
        text = torch.zeros(shape)
        lengths = torch.zeros(len(captions), dtype=torch.int64)
        for row, caption in enumerate(captions):
            tokens = rows[caption][0]
            text[row, : len(tokens)] = tokens.float()
            lengths[row] = len(tokens)
        pooled = torch.stack([rows[caption][1].float() for caption in captions])
        return {"text": text, "text_lengths": lengths, "pooled": pooled}

    def _rows(self, captions: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Tokens (length, d) and pooled vector (p,) of each different text."""
        if self._cache is None and (self.folder / "plan.json").is_file():
            self._cache = TextCache(self.folder, self.encoder.plan)
        asked = list(dict.fromkeys(captions))
        rows = {caption: self._remembered.get(caption) for caption in asked}
        unknown = [caption for caption, row in rows.items() if row is None]
        if self._cache is not None and unknown:
            here = self._cache.has(unknown)
            rows |= {
                c: self._cache.read(c) for c, found in zip(unknown, here, strict=True) if found
            }
            unknown = [caption for caption, found in zip(unknown, here, strict=True) if not found]
        if unknown:
            made = dict(zip(unknown, zip(*self._encode(unknown), strict=True), strict=True))
            rows |= made
            count = len(self._remembered) + len(made)
            if count * self.encoder.tokens * self.encoder.width > _REMEMBERED:
                self._remembered.clear()
            self._remembered |= made
        return rows

    def _encode(
        self, captions: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each text its own tokens (length, d) and pooled vector (p,), on the CPU."""
        tokens, pooled = [], []
        for start in range(0, len(captions), BATCH):
            check()
            found = self.encoder.encode(captions[start : start + BATCH])
            for row, length in zip(found.tokens.cpu(), found.lengths.tolist(), strict=True):
                tokens.append(row[:length].clone())
            pooled += found.pooled.cpu().unbind(0)
        return tokens, pooled


def open_features(config: TextConfig, key: str, device: torch.device) -> TextFeatures:
    """The text encoders that a model was trained with; others than those of `key` are refused."""
    features = TextFeatures(config, device)
    if features.key != key:
        raise UserError(
            f"{', '.join(config.encoders)} is another text encoder than the run was trained"
            " with: put the one back that it had"
        )
    return features


def captions_of(data: ShardSet) -> list[str]:
    """All captions of a set in stored order."""
    return [data.described(index)[2] for index in range(len(data))]


def first_captions(data: ShardSet, count: int) -> list[str]:
    """The first different captions of a set."""
    found: dict[str, None] = {}
    for index in range(len(data)):
        if len(found) == count:
            break
        found.setdefault(data.described(index)[2])
    return list(found)


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that hold something.

    Raises:
        UserError: the file is missing, not UTF-8, or empty.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as text ({error}): name a file of prompts"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one on each line")
    return prompts
