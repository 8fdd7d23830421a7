"""A row of results and a set of rows: what plans write (table.py) and exercises read."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from etude.core.errors import UserError
from etude.metrics.estimates import Estimate


@dataclass(frozen=True)
class Row:
    """One figure of one model on one data set.

    Attributes:
        model: as people call it; with `guidance` and `checkpoint` it says what drew the pictures.
        checkpoint: "" where a model is one; else which of its checkpoints, such as "64000".
        images_seen: training pictures that the checkpoint has seen; None where nobody knows.
        guidance: the scale; None for folders of pictures.
        seed: names the pictures that were drawn.
        training_seed: of the training run; None where nobody knows.
        data_set: as it is registered, or the name that the plan gives it.
        group: "" for all pictures together, else the group within the data set.
        metric: the figure ("FID", "precision", "CLIPScore").
        features: what it was computed from ("inception", "clip/text"); "" for scores of pictures.
        low, high, standard_error: of the interval at `level`; None where none was made.
        n_real, n_generated: pictures behind it; n_real 0 for scores of generated pictures alone.
        better: "lower" or "higher".
        protocol: fingerprint of what fixes the figure beside the model; rows with different
            protocols of one metric are never compared.
        selected: whether the pictures behind it chose or promoted the model: such a figure is shown
            beside, never as a result.
        estimate: digest of the row's estimate; "" where there is none.
        source: what drew the pictures, as the plan names it: rows of one model with two sources are
            rows of two models, and refused.
        date, revision: when, and of which code.
    """

    model: str
    data_set: str
    metric: str
    value: float
    better: str
    checkpoint: str = ""
    images_seen: int | None = None
    guidance: float | None = None
    seed: int = 0
    training_seed: int | None = None
    group: str = ""
    features: str = ""
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    level: float = 0.95
    n_real: int = 0
    n_generated: int = 0
    protocol: str = ""
    selected: bool = False
    estimate: str = ""
    source: str = ""
    date: str = ""
    revision: str = ""


def refuse_two_sources(rows: Iterable[Row]) -> None:
    """`UserError` where one model, checkpoint and training run was drawn from two sources."""
    found: dict[tuple, str] = {}
    for row in rows:
        who = row.model, row.checkpoint, row.training_seed
        first = found.setdefault(who, row.source)
        if first != row.source:
            raise UserError(
                f"the table has {row.model} from {first or 'an unknown source'} and from"
                f" {row.source or 'an unknown source'}; give each a name of its own, or a table"
            )


@dataclass(frozen=True)
class Results:
    """Rows with their estimates, by digest; what an exercise is given."""

    rows: tuple[Row, ...]
    estimates: dict[str, Estimate] = field(default_factory=dict)

    def estimate(self, row: Row) -> Estimate:
        """A row's estimate; one without replicates where the table keeps none."""
        return self.estimates.get(row.estimate, Estimate(row.metric, row.value))

    def where(self, **fields: object) -> "Results":
        """The rows whose fields have the given values."""
        kept = [r for r in self.rows if all(getattr(r, n) == v for n, v in fields.items())]
        return Results(tuple(kept), self.estimates)
