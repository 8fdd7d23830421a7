"""Models of the transformers library that answer questions about pictures, from local folders.

Called by metrics/alignment/vqa.py. Four architectures: BLIP (`BlipForQuestionAnswering`), BLIP-2
(`Blip2ForConditionalGeneration`) and InstructBLIP (`InstructBlipForConditionalGeneration`) with a
T5, OPT or Llama (Vicuna) language model, and LLaVA 1.5 (`LlavaForConditionalGeneration`); with them
the image processors BlipImageProcessor and CLIPImageProcessor, in transformers' PIL variant, which
needs no torchvision.

A picture passes the vision network once, however many questions it is asked; a question is read
once, however many answers are weighed. Questions of one batch may differ in length, and none is
changed by it: padding is masked, or kept away where transformers would show it (BLIP's decoder).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from etude.core.errors import UserError

from .transformers import _TOKENIZER, _WEIGHTS, _read, _stated, _weights

CLASSES = {
    "blip": "BlipForQuestionAnswering",
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
FRAMES = {  # what each was trained to find around a question
    "blip": "{question}",
    "blip-2": "Question: {question} Answer:",
    "instructblip": "{question}",
    "llava": "USER: <image>\n{question} ASSISTANT:",
}
ROOM = 32  # tokens that an answer may have
_PICTURE = "<image>"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Context:
    """n pairs of picture and question that have been read; what may follow is weighed or written.

    Args:
        count: n.
        logits: (n, m) answer tokens -> (n, m + 1, V), the token after the first 0 ... m of them.
    """

    def __init__(
        self, answerer: "VisualAnswerer", count: int, logits: Callable[[Tensor], Tensor]
    ) -> None:
        self._answerer, self._count, self._logits = answerer, count, logits

    @torch.no_grad()
    def log_probabilities(self, answer: str, *, end: bool = True) -> Tensor:
        """Log-probability of each token of `answer` given those before it, (n, tokens) float32.

        Args:
            end: count the mark that ends an answer as its last token.
        """
        tokens = self._answerer.answer_tokens(answer, end)
        wanted = torch.tensor(tokens, device=self._answerer.device).expand(self._count, -1)
        found = self._logits(wanted[:, :-1]).float().log_softmax(-1)
        return found.gather(2, wanted[:, :, None])[:, :, 0]

    @torch.no_grad()
    def write(self, max_tokens: int) -> list[str]:
        """The likeliest token after token, as text: until the end mark, at most `max_tokens`."""
        device, ends = self._answerer.device, self._answerer.ends
        said = torch.zeros(self._count, 0, dtype=torch.long, device=device)
        over = torch.zeros(self._count, dtype=torch.bool, device=device)
        while said.shape[1] < max_tokens and not bool(over.all()):
            following = self._logits(said)[:, -1].argmax(-1)
            said = torch.cat((said, following[:, None]), 1)
            over |= torch.isin(following, torch.tensor(ends, device=device))
        return [self._answerer.words(row) for row in said.tolist()]


class VisualAnswerer:
    """One model that answers questions about pictures; its weights are read with the first picture.

    Attributes:
        kind: "blip", "blip-2", "instructblip" or "llava".
        frame: text that stands around a question; {question} marks its place, and <image> that of
            the picture in LLaVA.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        frame: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """See `from_folder`."""
        self.folder, self.kind, self.dtype, self.device = folder, kind, dtype, device
        self.frame = frame or FRAMES[kind]
        if "{question}" not in self.frame or self.frame.count(_PICTURE) != (kind == "llava"):
            raise UserError(
                f"the frame {self.frame!r} does not suit {folder}: write one like {FRAMES[kind]!r}"
            )
        self._processor = _read(folder, "AutoImageProcessor", backend="pil")
        self._tokenizer = _read(folder, "AutoTokenizer")
        if kind == "instructblip":
            self._former_tokenizer = _read(folder / "qformer_tokenizer", "AutoTokenizer")
        self._network: nn.Module | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        frame: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "VisualAnswerer":
        """A trained model from a folder as transformers writes it; the network is never reached.

        Args:
            frame: what stands around a question; "" for what the model was trained with.
            dtype: of weights and arithmetic.

        Raises:
            UserError: the folder is missing or incomplete, its model is none of the four, or the
                frame lacks a place.
        """
        folder = Path(folder)
        found = _stated(folder).get("model_type", "")
        if found not in CLASSES:
            raise UserError(
                f"{folder / 'config.json'} describes {found or 'nothing'!r}, which answers no"
                f" questions about pictures here: name a folder of {', '.join(CLASSES.values())}"
            )
        if not _weights(folder):
            raise UserError(f"{folder} holds no weights: put {_WEIGHTS[0]} beside its config.json")
        if not any((folder / name).is_file() for name in _PROCESSORS):
            raise UserError(f"{folder} says not how pictures are prepared: add {_PROCESSORS[0]}")
        return cls(folder, found, frame, dtype, torch.device(device))

    @cached_property
    def identity(self) -> str:
        """sha256 over weights, configuration, tokenizers and image processor."""
        names = ("config.json", "generation_config.json", *_PROCESSORS, *_TOKENIZER)
        names += tuple(f"qformer_tokenizer/{name}" for name in _TOKENIZER)
        paths = [self.folder / name for name in names] + _weights(self.folder)
        digest = hashlib.sha256()
        for path in filter(Path.is_file, paths):
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(self.folder)} {found};".encode())
        return digest.hexdigest()

    @property
    def network(self) -> Any:
        """The model, read when it is first asked for.

        Raises:
            UserError: the folder's weights are damaged or not all there.
        """
        if self._network is None:
            name = CLASSES[self.kind]
            network, info = _read(self.folder, name, dtype=self.dtype, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):
                raise UserError(
                    f"the weights in {self.folder} lack {missing[0]} and {len(missing) - 1} more:"
                    " copy the folder again"
                )
            self._network = network.to(self.device).eval().requires_grad_(False)
        return self._network

    @property
    def ends(self) -> tuple[int, ...]:
        """Numbers of the tokens that end an answer, first the one that counts as its end."""
        if self.kind == "blip":
            return (self.network.config.text_config.sep_token_id,)
        stated = self._language.generation_config.eos_token_id
        stated = self._tokenizer.eos_token_id if stated is None else stated
        return tuple(stated) if isinstance(stated, list) else (stated,)

    def release(self) -> None:
        """Forget the weights; the next picture reads them again."""
        self._network = None

    @torch.no_grad()
    def see(self, images: Sequence[np.ndarray]) -> Tensor:
        """What the vision network says of B pictures (H, W, 1 or 3) uint8: (B, T, width).

        The model's own image processor brings them to its size.
        """
        coloured = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images]
        prepared = self._processor(coloured, return_tensors="pt", input_data_format="channels_last")
        pixels = prepared["pixel_values"].to(self.device, self.dtype)
        if self.kind == "llava":
            return torch.stack(tuple(self.network.get_image_features(pixels).pooler_output))
        seen = self.network.vision_model(pixel_values=pixels).last_hidden_state
        return self._queried(seen) if self.kind == "blip-2" else seen

    @torch.no_grad()
    def read(self, seen: Tensor, questions: Sequence[str]) -> Context:
        """Read one question for each of n rows of what `see` gave.

        Raises:
            UserError: a question is longer than the model reads.
        """
        texts = [self.frame.replace("{question}", question) for question in questions]
        tokens = self._tokenizer(texts)["input_ids"]
        if self.kind == "blip":
            return Context(self, len(texts), self._read_blip(seen, tokens, texts))
        if self.kind == "instructblip":
            seen = self._queried(seen, texts)
        rows = self._rows(seen, tokens, texts)
        return Context(self, len(texts), (self._prompted if self._decoder_only else self._t5)(rows))

    def answer_tokens(self, answer: str, end: bool) -> list[int]:
        """The numbers of an answer's tokens, as they follow a framed question."""
        if self._decoder_only:
            stem = self.frame.replace("{question}", "yes or no?")
            glue = "" if stem[-1].isspace() else " "
            before, both = self._tokenizer([stem, stem + glue + answer], add_special_tokens=False)[
                "input_ids"
            ]
            if both[: len(before)] != before:
                raise UserError(
                    f"the frame {self.frame!r} runs into the answer {answer!r}: end it without a"
                    " space"
                )
            tokens = both[len(before) :]
        else:
            tokens = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*tokens, *self.ends[:1]] if end else tokens

    def words(self, tokens: list[int]) -> str:
        """The text of an answer's tokens up to its end mark."""
        stop = next((at for at, token in enumerate(tokens) if token in self.ends), len(tokens))
        return self._tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()

    @property
    def _language(self) -> Any:
        """The language model of all kinds but BLIP."""
        return self.network if self.kind == "llava" else self.network.language_model

    @property
    def _decoder_only(self) -> bool:
        return self.kind != "blip" and not self._language.config.is_encoder_decoder

    def _queried(self, seen: Tensor, texts: list[str] | None = None) -> Tensor:
        """The Q-Former's queries, which read the text too in InstructBLIP: (n, queries, width)."""
        network, n = self.network, len(seen)
        queries = network.query_tokens.expand(n, -1, -1)
        asked = {"encoder_attention_mask": _ones(seen)}
        if texts is not None:
            tokens = self._former_tokenizer(texts)["input_ids"]
            self._fit(tokens, network.config.qformer_config.max_position_embeddings, texts)
            ids, mask = self._padded(tokens)
            asked |= {"input_ids": ids, "attention_mask": torch.cat((_ones(queries), mask), 1)}
        found = network.qformer(query_embeds=queries, encoder_hidden_states=seen, **asked)
        found = found.last_hidden_state[:, : queries.shape[1]]
        return network.language_projection(found.to(network.language_projection.weight.dtype))

    def _read_blip(
        self, seen: Tensor, tokens: list[list[int]], texts: list[str]
    ) -> Callable[[Tensor], Tensor]:
        config = self.network.config.text_config
        self._fit(tokens, config.max_position_embeddings, texts)
        ids, mask = self._padded(tokens)
        read = self.network.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=_ones(seen),
        ).last_hidden_state
        start = ids.new_full((len(ids), 1), config.bos_token_id)
        lengths = mask.sum(1)

        def logits(said: Tensor) -> Tensor:
            # transformers 5.23 drops the mask of BLIP's cross-attention: only questions of one
            # length may share a pass of the decoder.
            given, parts, places = torch.cat((start, said), 1), [], []
            for length in lengths.unique().tolist():
                rows = (lengths == length).nonzero()[:, 0]
                out = self.network.text_decoder(
                    input_ids=given[rows],
                    encoder_hidden_states=read[rows, :length],
                    use_cache=False,
                )
                parts.append(out.logits)
                places.append(rows)
            return torch.cat(parts)[torch.cat(places).argsort()]

        return logits

    def _t5(self, rows: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """An encoder-decoder: the encoder reads once, the decoder is run anew for each answer."""
        embedded, mask = _stacked(rows, left=False)
        language = self._language
        read = language.get_encoder()(inputs_embeds=embedded, attention_mask=mask)
        start = mask.new_full((len(rows), 1), language.config.decoder_start_token_id)
        return lambda said: (
            language(
                encoder_outputs=read,
                attention_mask=mask,
                decoder_input_ids=torch.cat((start, said), 1),
                use_cache=False,
            ).logits
        )

    def _prompted(self, rows: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """A decoder: it reads once and keeps keys and values, to which answers are appended."""
        embedded, mask = _stacked(rows, left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self._language(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, first = out.past_key_values, out.logits[:, -1:]

        def logits(said: Tensor) -> Tensor:
            length = said.shape[1]
            if not length:
                return first
            following = self._language(
                input_ids=said,
                attention_mask=torch.cat((mask, torch.ones_like(said)), 1),
                position_ids=positions[:, -1:] + torch.arange(1, length + 1, device=mask.device),
                past_key_values=cache,
                use_cache=True,
            ).logits
            cache.crop(-length)
            return torch.cat((first, following), 1)

        return logits

    def _rows(self, seen: Tensor, tokens: list[list[int]], texts: list[str]) -> list[Tensor]:
        """Embedded rows (length, width): a picture in its place, in front but for LLaVA."""
        config = self._language.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", 0) if self._decoder_only else 0
        self._fit(tokens, limit - seen.shape[1] - ROOM if limit else 0, texts)
        flat = torch.tensor([t for row in tokens for t in row], device=self.device)
        embedded = self._language.get_input_embeddings()(flat).split([len(t) for t in tokens])
        rows = []
        for own, picture, ids, text in zip(embedded, seen, tokens, texts, strict=True):
            before, after = 0, 0
            if self.kind == "llava":
                number = self.network.config.image_token_id
                if ids.count(number) != 1:
                    raise UserError(f"the text {text!r} has not one place for a picture: change it")
                before, after = ids.index(number), ids.index(number) + 1
            rows.append(torch.cat((own[:before], picture.to(own.dtype), own[after:])))
        return rows

    def _padded(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Numbers (n, longest) and mask, both int64, padded on the right."""
        rows = [torch.tensor(row, device=self.device) for row in tokens]
        return _stacked(rows, left=False)

    def _fit(self, tokens: list[list[int]], limit: int, texts: list[str]) -> None:
        for row, text in zip(tokens, texts, strict=True):
            if limit and len(row) > limit:
                raise UserError(
                    f"the question {text[:60]!r} has {len(row)} tokens, and {self.folder} reads"
                    f" {limit}: shorten its prompt"
                )


def _ones(x: Tensor) -> Tensor:
    """A mask (n, length) int64 that hides nothing of x (n, length, width)."""
    return torch.ones(x.shape[:2], dtype=torch.long, device=x.device)


def _stacked(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows (length, ...) as one tensor, zeros at the left or right, and its mask (n, longest)."""
    side = "left" if left else "right"
    ones = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
    return tuple(
        nn.utils.rnn.pad_sequence(each, batch_first=True, padding_side=side)
        for each in (rows, ones)
    )
