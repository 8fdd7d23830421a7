"""The list of promised features fits the code: files, texts, tests, and the page that shows it."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-does-evaluation-work.md"
_spec = importlib.util.spec_from_file_location("mutations_run", Path(__file__).with_name("run.py"))
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)
PROMISES = run.promises()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.feature)
def test_a_change_fits_the_code_and_its_test_exists(promise) -> None:
    assert (ROOT / promise.file).read_text().count(promise.old) == 1
    assert promise.old != promise.new and len(promise.peers) == 5
    file, _, name = promise.test.partition("::")
    defined = {
        node.name
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert name.partition("[")[0] in defined


def test_the_page_shows_the_list_in_its_order_and_no_other_rows() -> None:
    shown = [line for line in PAGE.read_text().splitlines() if "::test_" in line]
    assert shown == [promise.row for promise in PROMISES]
