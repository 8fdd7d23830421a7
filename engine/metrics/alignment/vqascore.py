"""VQAScore: how likely a model is to say that a picture shows its prompt; called by evaluation/.

    VQAScore = P("Yes" | picture, 'Does this figure show "TEXT"? Please answer yes or no.')

(Lin et al. 2024). An answer is its tokens a_1 ... a_m, of which the last ends it, and

    P(a | picture, question) = product over k of P(a_k | a_1 ... a_k-1, picture, question)

The authors' released code takes the m-th root of that, exp of the mean log-probability
(`likelihood: mean`); with "Yes" and its end mark that is about the square root of the above, so the
two must never be compared. It also asks InstructBLIP for "yes" and begins its question with
"Question: ". Their own CLIP-FlanT5 is not among the models of transformers.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import field_validator

from etude.core.config import option

from . import Images, as_pictures, scorer, texts_of
from .questions import Asked
from .vqa import VQAOptions, ask, open_answerer


class VQAScoreOptions(VQAOptions):
    """Options of VQAScore."""

    question: str = option(
        'Does this figure show "{text}"? Please answer yes or no.',
        "what is asked; {text} marks the place of the prompt",
    )
    answer: str = option("Yes", "the answer whose probability is the score", min_length=1)
    likelihood: Literal["product", "mean"] = option(
        "product", "product: probability of the answer's tokens; mean: their geometric mean"
    )
    end: bool = option(True, "whether the mark that ends an answer is one of its tokens")

    @field_validator("question")
    @classmethod
    def _has_a_place(cls, question: str) -> str:
        if "{text}" not in question:
            raise ValueError("the question has no place for the prompt: put {text} into it")
        return question


@scorer("vqascore")
class VQAScore:
    """VQAScore of pictures, with a model of transformers."""

    name: ClassVar = "vqascore"
    version: ClassVar = "1"
    needs: ClassVar = "picture"
    figures: ClassVar = ("vqascore",)
    better: ClassVar = "higher"
    at_least: ClassVar = 0.0
    at_most: ClassVar = 1.0
    Options: ClassVar = VQAScoreOptions

    def __init__(self, options: VQAScoreOptions, device: torch.device | str = "cpu") -> None:
        self.options, self.answerer = options, open_answerer(options, device)

    @property
    def weights_sha256(self) -> str:
        """Over the model's weights, configuration, tokenizers and image processor."""
        return self.answerer.identity

    def score(self, images: Images, prompts: Sequence[Asked]) -> dict[str, torch.Tensor]:
        """VQAScore (B,) float32 of B pictures, see `Scorer.score`.

        Raises:
            UserError: a prompt has no text, or is too long for the model.
        """
        pictures = as_pictures(images, prompts)
        texts = texts_of(prompts, self.name)
        questions = [[self.options.question.replace("{text}", text)] for text in texts]
        means = self.options.likelihood == "mean"

        def reply(context) -> list[float]:
            found = context.log_probabilities(self.options.answer, end=self.options.end)
            return (found.mean(1) if means else found.sum(1)).exp().tolist()

        said = ask(self.answerer, pictures, questions, self.options.batch, reply)
        return {"vqascore": torch.tensor([own[0] for own in said], dtype=torch.float32)}
