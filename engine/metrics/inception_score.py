"""The Inception score of a classifier's logits of generated pictures; called by evaluation/.

    IS = exp( mean over pictures of KL( p(y | x) | p(y) ) ),     p(y) = mean p(y | x)

(Salimans et al. 2016.) With `splits` the mean over parts of equal size, as the published numbers
take ten parts of 5,000; few pictures in a part bias it downwards. It looks at generated pictures
alone, rises with the number of classes that appear and with the classifier's certainty, and says
nothing of likeness to real ones. The plain name is for logits of the Inception network; those of
another network are another score and name it.
"""

import numpy as np
import torch

from etude.core.config import Config, option
from etude.core.errors import UserError
from etude.core.rng import Stream, bits

from .checked import check_features, options_of
from .registry import Pair, Values, metric


class InceptionScoreOptions(Config):
    """Options of the Inception score."""

    splits: int = option(10, "parts whose scores are averaged", ge=1)


def inception_score(logits: torch.Tensor, splits: int = 10, *, mixed: bool = True) -> float:
    """The Inception score of logits (N, C).

    Args:
        mixed: parts are random ones, fixed by N; else consecutive rows, in the order given.
    """
    splits = options_of(InceptionScoreOptions, "inception_score", {"splits": splits}).splits
    check_features(given=logits)
    part = parts(len(logits), splits) if mixed else _consecutive(len(logits), splits)
    keep = torch.ones(1, len(logits), dtype=torch.bool)
    return float(score_of_subsets(logits, keep, part)[0])


def score_of_subsets(logits: torch.Tensor, keep: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """The scores of R subsets of logits (N, C), (R,) float64.

    Args:
        keep: (R, N) bool.
        part: (N,) int64, the part that each row belongs to.
    """
    scores = []
    for number in range(int(part.max()) + 1):
        rows = (part == number).nonzero()[:, 0]
        log_p = logits[rows.to(logits.device)].to(torch.float64).log_softmax(1)
        mask = keep[:, rows].to(log_p.device, torch.float64)
        count = mask.sum(1)
        mask = mask / count.clamp_min(1)[:, None]
        p = log_p.exp()
        negative_entropy = mask @ torch.where(p > 0, p * log_p, 0.0).sum(1)
        marginal = mask @ p
        score = (negative_entropy - torch.xlogy(marginal, marginal).sum(1)).exp()
        scores.append(torch.where(count > 0, score, torch.nan))
    return torch.stack(scores).nanmean(0)  # of the parts that have rows


def parts(count: int, splits: int) -> torch.Tensor:
    """A random part for each row, (count,) int64, of sizes that differ by one at most."""
    words = torch.from_numpy(bits(0, Stream.PART, [0], count)[0].astype("int64"))
    part = torch.empty(count, dtype=torch.int64)
    part[words.argsort(stable=True)] = _consecutive(count, splits)
    return part


def _consecutive(count: int, splits: int) -> torch.Tensor:
    if splits > count:
        raise UserError(
            f"{splits} parts cannot be made of {count} pictures; set splits lower, or draw more"
        )
    ends = torch.arange(1, splits + 1) * count // splits
    return torch.searchsorted(ends, torch.arange(count), right=True)


def enough_of_score(options: InceptionScoreOptions, dim: int) -> tuple[int, str]:
    """Pictures for parts that hold every class several times."""
    why = "with fewer pictures in a part than classes the score is biased downwards"
    return options.splits * dim, why


@metric(
    "inception_score",
    features="mobilenet/logits",
    better="higher",
    at_least=1.0,
    needs_real=False,
    options=InceptionScoreOptions,
    enough=enough_of_score,
    least=lambda options, share: options.splits if share == 1.0 else 5 * options.splits,
    check=lambda features: score_name(features),
)
def score(pair: Pair, share: float, real: torch.Tensor, generated: torch.Tensor) -> Values:
    """The Inception score of R subsets of generated pictures."""
    options = pair.options_as(InceptionScoreOptions)
    part = parts(len(pair.generated), options.splits)
    found = score_of_subsets(pair.generated, generated, part)
    return {score_name(pair.features): np.asarray(found.cpu())}


def score_name(features: str) -> str:
    """What a score is called: plainly for Inception's logits without biases, as it is published.

    Raises:
        UserError: the features are no logits.
    """
    network, _, tap = features.partition("/")
    if not tap.startswith("logits"):
        raise UserError(
            f"the Inception score takes logits, not {features!r}: write {network}/logits"
        )
    if features == "inception/logits_unbiased":
        return "Inception score"
    return f"Inception score ({network if tap == 'logits' else features})"
