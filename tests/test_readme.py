"""The README says what is there: its operators are the catalogue's, its recipes all of them."""

import re
from pathlib import Path

from etude.core.recipe import shipped

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_operators_is_up_to_date(monkeypatch) -> None:
    """All columns but the measured ones, which are as old as the last `make bench`."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import readme

    def stated(lines: list[str]) -> list[list[str]]:
        return [[c.strip() for c in line.split("|")[1:5]] for line in lines if line[:3] == "| `"]

    text = (ROOT / "README.md").read_text()
    shown = text.split(readme.MARK)[1].splitlines()
    assert stated(shown) == stated(readme.table()), "type: python -m benchmarks.readme"
    assert len(stated(shown)) >= 20


def test_every_results_file_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"benchmarks/results/[a-z0-9_]+\.jsonl", text))
    assert named and all((ROOT / name).exists() for name in named)


def test_the_tables_of_recipes_name_every_recipe_once() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("| `"))
    named = re.findall(r"`([a-z_]+/[a-z0-9_]+)`", rows)
    assert sorted(named) == shipped(), "add to, or remove from, the README's tables of recipes"
