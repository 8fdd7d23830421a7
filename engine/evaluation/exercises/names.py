"""What figures and models are called in an exercise's sentences; called by every exercise."""

from collections.abc import Iterable
from dataclasses import dataclass

from etude.core.errors import UserError

from ..results import Row

ONE_RUN_EACH = "Each entry is one training run; how runs differ is not included."


@dataclass(frozen=True)
class Figure:
    """A metric of one kind of features, as the table has it.

    Attributes:
        name: "FID", or "precision@dinov2" where the table has it of several features.
        better: "lower" or "higher".
    """

    metric: str
    features: str
    name: str
    better: str

    @property
    def sign(self) -> float:
        """Times it, larger is better."""
        return 1.0 if self.better == "higher" else -1.0

    @property
    def label(self) -> str:
        """The name with the good direction, for axes and titles."""
        return f"{self.name} ({self.better} is better)"

    def has(self, row: Row) -> bool:
        """Whether a row holds this figure."""
        return (row.metric, row.features) == (self.metric, self.features)


@dataclass(frozen=True, order=True)
class Subject:
    """What drew the pictures of a row; empty text and None for what the table does not say."""

    model: str
    checkpoint: str
    guidance: float | None
    training_seed: int | None
    seed: int


def subject(row: Row) -> Subject:
    """What drew a row's pictures."""
    return Subject(row.model, row.checkpoint, row.guidance, row.training_seed, row.seed)


def subject_names(rows: Iterable[Row]) -> dict[Subject, str]:
    """The shortest names that tell the subjects of these rows apart, in the order of the rows."""
    found = list(dict.fromkeys(subject(row) for row in rows))
    more: dict[Subject, list[str]] = {one: [] for one in found}
    for name, words in (
        ("checkpoint", "checkpoint {}"),
        ("guidance", "guidance {:g}"),
        ("training_seed", "training seed {}"),
        ("seed", "seed {}"),
    ):
        by_model: dict[str, set] = {}
        for one in found:
            by_model.setdefault(one.model, set()).add(getattr(one, name))
        for one in found:
            value = getattr(one, name)
            if len(by_model[one.model]) > 1 and value not in (None, ""):
                more[one].append(words.format(value))
    return {one: f"{one.model} ({', '.join(w)})" if w else one.model for one, w in more.items()}


def title(row: Row) -> str:
    """A row's model with all that the table says of the setting, for refusals."""
    more = [f"checkpoint {row.checkpoint}"] if row.checkpoint else []
    more += [f"guidance {row.guidance:g}"] if row.guidance is not None else []
    more += [f"group {row.group}"] if row.group else []
    return f"{row.model} ({', '.join(more)})" if more else row.model


def where(row: Row) -> str:
    """The data set of a row, with its group."""
    return f"{row.data_set}, {row.group}" if row.group else row.data_set


def find_figure(figures: list[Figure], spec: str) -> Figure | None:
    """The figure that "FID" or "precision@dinov2" names, None where it is not there.

    Raises:
        UserError: the table has it of several features and none are named.
    """
    metric, at, features = spec.partition("@")
    found = [f for f in figures if f.metric == metric and (not at or f.features == features)]
    if len(found) > 1:
        spelled = " or ".join(f"{figure.metric}@{figure.features}" for figure in found)
        raise UserError(f"the table has {spec} of several features; write {spelled}")
    return found[0] if found else None


def joined(names: Iterable[str], most: int = 6) -> str:
    """Names as a sentence lists them: "a, b and c", the rest counted."""
    names = list(names)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def all_of(count: int) -> str:
    """ "both" for two, "all 3" for three."""
    return "both" if count == 2 else f"all {count}"


def reasons(notes: Iterable[str]) -> str:
    """Notes on what was left out as a refusal repeats them, in brackets; "" without any."""
    told = [note.removeprefix("Left out: ").removesuffix(".") for note in dict.fromkeys(notes)]
    return f" ({'; '.join(told)})" if told else ""
