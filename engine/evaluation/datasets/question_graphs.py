"""Prompts with question graphs: TIFA160 and DSG-1k (Cho et al. 2024, "Davidsonian Scene Graph").

The official files are `tifa160-dev-anns.csv` (160 prompts) and `dsg-1k-anns.csv` (1,060), a row per
question with the columns item_id, text, proposition_id, dependency ("0" for none, or numbers such
as "1,3") and question_natural_language. A prompt comes once, where its item first stands.

What the files hold beside that is read so: a proposition without a question (78 rows of TIFA160)
asks nothing, and its own dependencies stand in for it; a dependency on a proposition that is not
there, or on itself, is none; where two questions of a prompt have one number, the second is called
"5.2" and others mean the first.
"""

from collections.abc import Iterable
from pathlib import Path

from . import Question, data_set
from .items import Item, ItemDataSet, expect, first_file, read_table

_COLUMNS = ["item_id", "text", "proposition_id", "dependency", "question_natural_language"]


class _QuestionGraphs(ItemDataSet):
    """Prompts of one such table.

    Args:
        folder: holds the table, itself or in `dsg/data`.
        whole: refuse another number of prompts than was published.
    """

    file, count = "", 0

    def __init__(self, folder: str | Path, *, whole: bool = True) -> None:
        super().__init__(folder)
        self.whole = whole
        self._table = first_file(self.folder, [self.file, f"dsg/data/{self.file}"], self.name)

    def read_items(self) -> Iterable[Item]:
        rows: dict[str, list[dict[str, str]]] = {}
        for row in read_table(self._table, _COLUMNS):
            rows.setdefault(row["item_id"], []).append(row)
        expect(len(rows), self.count, self.whole, f"{self._table}: the prompts")
        return [
            Item(id, "", some[0]["text"].strip(), group=self._group(id), questions=_graph(some))
            for id, some in rows.items()
        ]

    def _group(self, id: str) -> str:
        return ""


@data_set("tifa160")
class Tifa160(_QuestionGraphs):
    """The 160 prompts of TIFA160 with their question graphs; prompts alone, no groups."""

    name, file, count = "tifa160", "tifa160-dev-anns.csv", 160


@data_set("dsg1k")
class Dsg1k(_QuestionGraphs):
    """The 1,060 prompts of DSG-1k; the group is the source that a prompt was taken from."""

    name, file, count = "dsg1k", "dsg-1k-anns.csv", 1_060

    def _group(self, id: str) -> str:
        return id.rpartition("_")[0]


def _graph(rows: list[dict[str, str]]) -> tuple[Question, ...]:
    """The questions of one prompt."""
    parents: dict[str, list[str]] = {}
    asked: dict[str, str] = {}
    for row in rows:
        number, text = row["proposition_id"].strip(), row["question_natural_language"].strip()
        needs = [part.strip() for part in row["dependency"].split(",")]
        needs = [part for part in needs if part.isdecimal() and part != "0"]
        if text and number in asked:
            number = f"{number}.{sum(known.partition('.')[0] == number for known in asked) + 1}"
        if text:
            asked[number] = text
        if text or number not in parents:
            parents[number] = needs
    return tuple(
        Question(number, text, tuple(_asked_parents(number, parents, asked)))
        for number, text in asked.items()
    )


def _asked_parents(number: str, parents: dict[str, list[str]], asked: dict[str, str]) -> list[str]:
    """The nearest propositions above that have a question, each once, in the order stated."""
    found: dict[str, None] = {}
    seen, waiting = {number}, list(reversed(parents[number]))
    while waiting:
        above = waiting.pop()
        if above in seen:
            continue
        seen.add(above)
        if above in asked:
            found[above] = None
        else:
            waiting += reversed(parents.get(above, []))
    return list(found)
