"""Rows of one figure that do not compare: refusals that name remedies, and notes where allowed.

Called by rows.py, orders.py, groups.py and prompt_types.py. A figure depends on the numbers of
pictures behind it and on its protocol. A protocol fixes one metric on one data set and group at one
number of pictures, so choosing by protocols takes one for each of them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from etude.core.errors import UserError
from etude.core.recipe_tree import resolve

from ..results import Row
from .names import Figure, Subject, joined, subject, subject_names, title

SHOWN = 12  # characters of a fingerprint
SHORTEST = 4  # beginning of a fingerprint that an option takes
MOST_COUNTS = 12  # groups whose numbers of pictures a note lists one by one


def refuse_mixture(
    figure: Figure,
    place: str,
    rows: Sequence[Row],
    among: Sequence[Row] = (),
    *,
    groups: bool = False,
) -> None:
    """`UserError` where rows of one figure differ in protocol or in numbers of pictures.

    Args:
        among: every row of the exercise, from which a choice of protocols is made; none: no such
            remedy is named.
        groups: rows are those of groups or data sets, whose numbers may be allowed to differ and
            whose protocols name different pictures.
    """
    remedy = "evaluate both the same way"
    count = 0 if groups else _shared_count(rows)
    if count and _first_two(rows, "n_generated"):
        remedy += f" or choose with n_generated={count}"
    refuse_numbers(figure, place, rows, remedy)
    if not groups:
        refuse_protocols(figure, place, rows, among)


def refuse_numbers(figure: Figure, place: str, rows: Sequence[Row], remedy: str) -> None:
    """`UserError` with this remedy where rows differ in their numbers of pictures."""
    for name, words in (
        ("n_generated", "{:,} generated pictures"),
        ("n_real", "{:,} real pictures"),
    ):
        both = _first_two(rows, name)
        if both:
            raise UserError(f"{_told(figure, place, both, name, words)}; {remedy}")


def refuse_protocols(
    figure: Figure, place: str, rows: Sequence[Row], among: Sequence[Row], fewest: int = 2
) -> None:
    """`UserError` where rows of equal numbers of pictures differ in protocol.

    Args:
        among: as of `refuse_mixture`.
        fewest: models that a choice of protocols has to leave.
    """
    by_number: dict[tuple, list[Row]] = {}
    for row in rows:
        by_number.setdefault((row.n_generated, row.n_real), []).append(row)
    for some in by_number.values():
        both = _first_two(some, "protocol")
        if not both:
            continue
        a, b = (row.protocol for row in both)
        remedy = f"evaluate both the same way (the table's protocols/{a}.json and {b}.json say"
        remedy += " what differs)"
        chosen = _protocols_that_work(some, among, fewest)
        if chosen:
            spelled = ", ".join(_spelled(one[:SHOWN]) for one in chosen)
            remedy += f" or choose with protocols=[{spelled}]"
        raise UserError(f"{_told(figure, place, both, 'protocol', 'protocol {:.12}')}; {remedy}")


def refuse_two_numbers(figure: Figure, place: str, rows: Sequence[Row]) -> None:
    """`UserError` where one model has one figure of one place at two numbers of pictures."""
    by_subject: dict = {}
    for row in rows:
        by_subject.setdefault(subject(row), []).append(row)
    for some in by_subject.values():
        for name, words in (("n_generated", "generated"), ("n_real", "real")):
            both = _first_two(some, name)
            if not both:
                continue
            remedy = " or ".join(f"n_generated={row.n_generated}" for row in both)
            if name == "n_real":
                remedy = "protocols=[...], whose fingerprints are in the table's column protocol"
            told = _told(figure, place, both, name, f"{{:,}} {words} pictures")
            raise UserError(f"{told}; choose with {remedy}")


def unequal_numbers(rows: Sequence[Row]) -> str:
    """Which numbers of pictures rows of several groups have, in words; "" where all are equal."""
    parts = []
    for name, words in (("n_generated", "generated"), ("n_real", "real")):
        if len({getattr(row, name) for row in rows}) < 2:
            continue
        told: dict[str, list[str]] = {}
        for one, called in subject_names(rows).items():
            own = {row.group: getattr(row, name) for row in rows if subject(row) == one}
            told.setdefault(_counts(own), []).append(called)
        counts = [f"{joined(who)}: {what}" for what, who in told.items()]
        if len(told) == 1:
            counts = list(told)
        parts.append(f"{words} pictures ({'; '.join(counts)})")
    return " and of ".join(parts)


def protocols_named(wanted: Iterable[str], known: Sequence[str]) -> list[str]:
    """The fingerprints among `known` that begin as wanted.

    Raises:
        UserError: a beginning is too short, or fits none of them, or several.
    """
    found = []
    for beginning in wanted:
        if len(beginning) < SHORTEST:
            raise UserError(
                f"protocols: {beginning!r} is too short; write {SHORTEST} characters at least"
            )
        fitting = [one for one in known if one.startswith(beginning)]
        if not fitting:
            there = ", ".join(_spelled(one[:SHOWN]) for one in known if one) or "none"
            raise UserError(f"the table has no protocol {beginning!r} here; it has {there}")
        if len(fitting) > 1 and beginning not in fitting:
            several = joined(one[:SHOWN] for one in fitting)
            raise UserError(
                f"{beginning!r} begins several protocols here: {several}; write more of one"
            )
        found.append(beginning if beginning in fitting else fitting[0])
    return found


def _told(figure: Figure, place: str, both: Sequence[Row], name: str, words: str) -> str:
    (one, a), (two, b) = ((title(row), getattr(row, name)) for row in both)
    return (
        f"{figure.name} on {place} cannot be compared: {one} has {words.format(a)} and {two} "
        f"{words.format(b)}"
    )


def _first_two(rows: Iterable[Row], name: str) -> list[Row]:
    """The first rows of the first two values of a field; none where all are equal."""
    first: dict = {}
    for row in rows:
        first.setdefault(getattr(row, name), row)
    return list(first.values())[:2] if len(first) > 1 else []


def _shared_count(rows: Iterable[Row]) -> int:
    """The number of generated pictures that most models have, two at least; 0: there is none."""
    counts = Counter(n for n, _ in {(row.n_generated, subject(row)) for row in rows})
    best = max(counts, key=lambda n: (counts[n], n), default=0)
    return best if counts[best] > 1 else 0


def _protocols_that_work(rows: Sequence[Row], among: Sequence[Row], fewest: int) -> list[str]:
    """One protocol for each figure, data set, group and number of pictures: that of most models,
    of these the newest. None where fewer than `fewest` models would be left.
    """
    places: dict[tuple, list[Row]] = {}
    for row in among:
        places.setdefault(_place(row), []).append(row)
    chosen = {place: _most_common(some) for place, some in places.items()}
    left = {subject(row) for row in rows if row.protocol == chosen.get(_place(row))}
    if len(left) < fewest or any(len(one) < SHORTEST for one in chosen.values()):
        return []
    return list(dict.fromkeys(chosen.values()))


def _most_common(rows: Sequence[Row]) -> str:
    models: dict[str, set[Subject]] = {}
    newest: dict[str, str] = {}
    for row in rows:
        models.setdefault(row.protocol, set()).add(subject(row))
        newest[row.protocol] = max(row.date, newest.get(row.protocol, ""))
    return max(models, key=lambda one: (len(models[one]), newest[one]))


def _place(row: Row) -> tuple:
    numbers = row.n_generated, row.n_real
    return row.data_set, row.group, row.metric, row.features, numbers


def _counts(by_group: dict[str, int]) -> str:
    if len(set(by_group.values())) == 1:
        return f"{next(iter(by_group.values())):,} of every group"
    if len(by_group) > MOST_COUNTS:
        return f"{min(by_group.values()):,} to {max(by_group.values()):,}"
    return ", ".join(f"{group} {n:,}" for group, n in by_group.items())


def _spelled(text: str) -> str:
    """As YAML takes it for text: quoted where it would read as a number or as nothing."""
    try:
        plain = isinstance(resolve(text), str)
    except UserError:
        plain = False
    return text if plain else f"'{text}'"
