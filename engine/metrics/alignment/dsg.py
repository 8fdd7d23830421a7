"""DSG and TIFA: the share of questions about its prompt to which a picture says yes.

    dsg        mean over a picture's questions of: answered yes, and so were all it presupposes
    yes_share  mean over a picture's questions of: answered yes

then the mean over pictures; called by evaluation/. `dsg` is that of Davidsonian scene graphs (Cho
et al. 2024), where a no zeroes the children of a question, theirs, and so on, whatever the order of
the questions. `yes_share` is TIFA's accuracy (Hu et al. 2023) for yes-or-no questions, which have
no parents; without parents both are equal. Every picture weighs the same, however many questions it
has.

A yes is decided in one of two ways. `generate` lets the model write, and a text that starts with
"yes" is one (EvalGIM takes "yes" alone). `probability` compares P("yes") with P("no"), each with
the mark that ends an answer; it cannot be missed by a model that begins with other words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import field_validator, model_validator

from etude.core.config import option
from etude.core.errors import UserError
from etude.external.transformers_vqa import ROOM, Context

from . import Images, as_pictures, scorer
from .questions import Answer, Asked, counting, parents_first
from .vqa import VQAOptions, ask, open_answerer


class DSGOptions(VQAOptions):
    """Options of DSG."""

    answer: Literal["generate", "probability"] = option(
        "generate", "how a yes is decided: by what the model writes, or by P(yes) > P(no)"
    )
    question: str = option(
        "{question} Answer yes or no.", "what is asked; {question} marks the question's place"
    )
    max_tokens: int = option(5, "most tokens of an answer that the model writes", gt=0, le=ROOM)
    yes: str = option("yes", "the answer that counts, for `probability`", min_length=1)
    no: str = option("no", "the answer that it is compared with", min_length=1)

    @field_validator("question")
    @classmethod
    def _has_a_place(cls, question: str) -> str:
        if "{question}" not in question:
            raise ValueError("there is no place for the question: put {question} into it")
        return question

    @model_validator(mode="after")
    def _nothing_idle(self) -> "DSGOptions":
        idle = ("max_tokens",) if self.answer == "probability" else ("yes", "no")
        for name in filter(self.differs, idle):
            raise ValueError(f"{name} has no effect with answer={self.answer}: leave it out")
        return self


@dataclass(frozen=True)
class Assessed:
    """What DSG found: figure -> (B,) float32, and the answers of each picture."""

    scores: dict[str, torch.Tensor]
    answers: list[tuple[Answer, ...]]


@scorer("dsg")
class DSG:
    """DSG of pictures whose prompts have questions, with a model of transformers."""

    name: ClassVar = "dsg"
    version: ClassVar = "1"
    needs: ClassVar = "picture"
    figures: ClassVar = ("dsg", "yes_share")
    better: ClassVar = "higher"
    at_least: ClassVar = 0.0
    at_most: ClassVar = 1.0
    Options: ClassVar = DSGOptions

    def __init__(self, options: DSGOptions, device: torch.device | str = "cpu") -> None:
        self.options, self.answerer = options, open_answerer(options, device)

    @property
    def weights_sha256(self) -> str:
        """Over the model's weights, configuration, tokenizers and image processor."""
        return self.answerer.identity

    def score(self, images: Images, prompts: Sequence[Asked]) -> dict[str, torch.Tensor]:
        """`dsg` and `yes_share`, (B,) float32, of B pictures, see `Scorer.score`.

        Raises:
            UserError: a prompt has no questions, or they are no graph.
        """
        return self.assess(images, prompts).scores

    def assess(self, images: Images, prompts: Sequence[Asked]) -> Assessed:
        """The scores, and every question's answer.

        Raises:
            UserError: as `score`.
        """
        pictures = as_pictures(images, prompts)
        for prompt in prompts:
            if not prompt.questions:
                raise UserError(f"prompt {prompt.id!r} has no questions: leave dsg out")
            parents_first(prompt.questions, f"prompt {prompt.id!r}")
        questions = [
            [self.options.question.replace("{question}", q.text) for q in prompt.questions]
            for prompt in prompts
        ]
        reply = self._written if self.options.answer == "generate" else self._compared
        said = ask(self.answerer, pictures, questions, self.options.batch, reply)
        answers = [
            answered(prompt, [text for text, _ in own], [yes for _, yes in own])
            for prompt, own in zip(prompts, said, strict=True)
        ]
        return Assessed(scored(answers), answers)

    def _written(self, context: Context) -> list[tuple[str, bool]]:
        return [(text, is_yes(text)) for text in context.write(self.options.max_tokens)]

    def _compared(self, context: Context) -> list[tuple[str, bool]]:
        one, other = (
            context.log_probabilities(word).sum(1) for word in (self.options.yes, self.options.no)
        )
        shares, wins = (one - other).sigmoid().tolist(), (one > other).tolist()
        return [(f"{share:.4f}", yes) for share, yes in zip(shares, wins, strict=True)]


def is_yes(text: str) -> bool:
    """Whether an answer in words is a yes: it starts so, in capitals or not."""
    return text.strip().lower().startswith("yes")


def answered(prompt: Asked, said: Sequence[str], yes: Sequence[bool]) -> tuple[Answer, ...]:
    """The answers to a prompt's questions, each with whether it counts.

    Raises:
        UserError: the questions are no graph.
    """
    counts = counting(prompt.questions, yes, f"prompt {prompt.id!r}")
    rows = zip(prompt.questions, said, yes, counts, strict=True)
    return tuple(Answer(question, text, one, own) for question, text, one, own in rows)


def scored(answers: Sequence[Sequence[Answer]]) -> dict[str, torch.Tensor]:
    """Both figures of each picture, (B,) float32, from its answers."""
    shares = {
        "dsg": [sum(a.counts for a in own) / len(own) for own in answers],
        "yes_share": [sum(a.yes for a in own) / len(own) for own in answers],
    }
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in shares.items()}
