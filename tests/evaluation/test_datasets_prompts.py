"""Published lists of prompts, written small as their publishers lay them out."""

from pathlib import Path
from typing import Any

import pytest

from etude.core.errors import UserError
from etude.evaluation.datasets import Prompt, Prompts, Question, open_data_set


def asked(data_set: Any, **options: Any) -> list[tuple[str, str, str]]:
    """(id, text, group) of every prompt."""
    return [(p.id, p.text, p.group) for p in data_set.prompts(**options).prompts]


HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
)


def row(item: str, text: str, number: str, needs: str, question: str) -> str:
    return f'{item},"{text}",k,{number},"{needs}",entity,whole,"entity - whole (k)",{question}\n'


def test_question_graphs_are_of_prompts_and_not_of_rows(tmp_path) -> None:
    """Every irregularity that the official file has, once."""
    lines = [
        row("coco_1", "A car, and a truck.", "1", "0", "Is there a car?"),
        row("coco_1", "A car, and a truck.", "2", "1", " "),  # no question: 3 then needs 1
        row("coco_1", "A car, and a truck.", "3", "2, 1", "Is it red?"),
        row("coco_1", "A car, and a truck.", "4", "9,3", "Is it fast?"),  # 9 is not there
        row("drawbench_68", "Three books ", "5", "0", "Is one blue?"),
        row("drawbench_68", "Three books ", "5", "5", "Is it on top?"),  # a second 5
        row("drawbench_68", "Three books ", "6", "5,6", "Is it under?"),  # needs itself
        row("drawbench_68", "Three books ", "7", "5, right", "Is it right?"),
        row("coco_2", "Lights", "5", "0", ""),  # a second 5 with the question
        row("coco_2", "Lights", "4", "0", "Are there lights?"),
        row("coco_2", "Lights", "5", "4", "Are they on?"),
        row("coco_2", "Lights", "5", "0", " "),  # and one without after it
    ]
    (tmp_path / "tifa160-dev-anns.csv").write_text(HEADER + "".join(lines))
    found = open_data_set("tifa160", tmp_path, whole=False)
    assert found.pictures() is None
    assert asked(found) == [
        ("coco_1", "A car, and a truck.", ""),
        ("drawbench_68", "Three books", ""),
        ("coco_2", "Lights", ""),
    ]
    first, second, third = (prompt.questions for prompt in found.prompts().prompts)
    assert first == (
        Question("1", "Is there a car?"),
        Question("3", "Is it red?", ("1",)),
        Question("4", "Is it fast?", ("3",)),
    )
    assert second == (
        Question("5", "Is one blue?"),
        Question("5.2", "Is it on top?", ("5",)),
        Question("6", "Is it under?", ("5",)),
        Question("7", "Is it right?", ("5",)),
    )
    assert third == (Question("4", "Are there lights?"), Question("5", "Are they on?", ("4",)))
    with pytest.raises(UserError, match="the prompts are 3 instead of 160"):
        open_data_set("tifa160", tmp_path).prompts()
    with pytest.raises(UserError, match="has no dsg-1k-anns.csv"):
        open_data_set("dsg1k", tmp_path)


def test_a_ring_of_propositions_without_questions_ends(tmp_path) -> None:
    lines = [
        row("whoops_58", "A ring", "1", "2", ""),
        row("whoops_58", "A ring", "2", "1,4", ""),
        row("whoops_58", "A ring", "3", "1", "Is it round?"),
        row("whoops_58", "A ring", "4", "3", "Is it gold?"),
    ]
    (tmp_path / "dsg" / "data").mkdir(parents=True)
    (tmp_path / "dsg" / "data" / "dsg-1k-anns.csv").write_text(HEADER + "".join(lines))
    found = open_data_set("dsg1k", tmp_path, whole=False)
    assert asked(found) == [("whoops_58", "A ring", "whoops")]
    assert found.prompts().prompts[0].questions == (
        Question("3", "Is it round?", ("4",)),
        Question("4", "Is it gold?", ("3",)),
    )


PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology\n"
    '"G I G" painted in thick letters\tArts\tWriting & Symbols\t\n'
    'a wall with the words "Fly, 1" \tArts\tComplex\t\n'
    "an eagle\tAnimals\tBasic\n"
)


def test_partiprompts_keep_their_quotation_marks_and_categories(tmp_path) -> None:
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    found = open_data_set("partiprompts", tmp_path, whole=False)
    assert asked(found) == [
        ("0", "bond", "Abstract"),
        ("1", '"G I G" painted in thick letters', "Arts"),
        ("2", 'a wall with the words "Fly, 1"', "Arts"),
        ("3", "an eagle", "Animals"),
    ]
    by_challenge = open_data_set("partiprompts", tmp_path, groups="challenge", whole=False)
    groups = [group for _, _, group in asked(by_challenge)]
    assert groups == ["Basic", "Writing & Symbols", "Complex", "Basic"]
    plain = open_data_set("partiprompts", tmp_path, groups="", whole=False)
    assert {group for _, _, group in asked(plain)} == {""}
    assert plain.prompts().fingerprint != found.prompts().fingerprint
    with pytest.raises(UserError, match="no groups by 'note'; set groups to category"):
        open_data_set("partiprompts", tmp_path, groups="note")
    with pytest.raises(UserError, match="are 4 instead of 1,632"):
        open_data_set("partiprompts", tmp_path).prompts()


def test_drawbench_has_each_prompt_once(tmp_path) -> None:
    text = 'Prompts,Category\r\nA red car.,Colors\r\n"Two ""cats"", one dog.",Counting\r\n'
    (tmp_path / "Imagen DrawBench.csv").write_text(text + "A red car.,Colors\r\n,\r\n")
    found = open_data_set("drawbench", tmp_path, whole=False)
    assert asked(found) == [
        ("0", "A red car.", "Colors"),
        ("1", 'Two "cats", one dog.', "Counting"),
        ("2", "A red car.", "Colors"),
    ]
    other = tmp_path / "text"
    other.mkdir()
    with pytest.raises(UserError, match="export it there as CSV"):
        open_data_set("drawbench", other)
    (other / "drawbench.txt").write_text("A red car.\n\nA dog.\n")
    found = open_data_set("drawbench", other, whole=False)
    assert asked(found) == [("0", "A red car.", ""), ("1", "A dog.", "")]
    with pytest.raises(UserError, match="the prompts are 2 instead of 200"):
        open_data_set("drawbench", other).prompts()


def test_drawbench_is_taken_from_the_file_of_its_name(tmp_path) -> None:
    (tmp_path / "A.csv").write_text("Prompt,Note\nother,1\n")
    (tmp_path / "drawbench.txt").write_text("lines\n")
    assert asked(open_data_set("drawbench", tmp_path, whole=False))[0][1] == "lines"
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\nsheet,Colors\n")
    assert asked(open_data_set("drawbench", tmp_path, whole=False))[0][1] == "sheet"
    (tmp_path / "Imagen DrawBench.csv").write_text("Prompts,Category\nsheet,Colors\n")
    with pytest.raises(UserError, match="holds Imagen DrawBench.csv and drawbench.csv; keep one"):
        open_data_set("drawbench", tmp_path)
    for name in ("drawbench.csv", "Imagen DrawBench.csv", "drawbench.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "B.csv").write_text("Prompts,Category\nsheet,Colors\n")
    with pytest.raises(UserError, match="holds A.csv and B.csv; keep one, or name one drawbench"):
        open_data_set("drawbench", tmp_path)


def test_t2icompbench_has_a_file_a_category(tmp_path) -> None:
    folder = tmp_path / "examples" / "dataset"
    folder.mkdir(parents=True)
    (folder / "color_val.txt").write_bytes(b"a green bench\r\na blue bowl\r\n\r\n")
    (folder / "non-spatial_val.txt").write_text("a man sits\n\n \n")
    for unused in ("color.txt", "color_train.txt", "color_val_seen.txt"):
        (folder / unused).write_text("not for evaluation\n")
    expected = [
        ("color/0", "a green bench", "color"),
        ("color/1", "a blue bowl", "color"),
        ("non_spatial/0", "a man sits", "non_spatial"),
    ]
    for place in (tmp_path, folder):
        assert asked(open_data_set("t2icompbench", place, whole=False)) == expected
    with pytest.raises(UserError, match="color_val.txt: the prompts are 2 instead of 300"):
        open_data_set("t2icompbench", folder).prompts()
    (tmp_path / "own").mkdir()
    with pytest.raises(UserError, match="has no .txt files"):
        open_data_set("t2icompbench", tmp_path / "own")
    (tmp_path / "own" / "weather.txt").write_text("rain\n")
    found = open_data_set("t2icompbench", tmp_path / "own")
    assert asked(found) == [("weather/0", "rain", "weather")]


@pytest.mark.parametrize("inside", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path, inside) -> None:
    """Characters that `str.splitlines` cuts at, inside the prompts of every kind of file."""
    text = f"a{inside}b"
    files = {
        "partiprompts": ("PartiPrompts.tsv", f"Prompt\tCategory\tChallenge\r\n{text}\tA\tB\r\n"),
        "drawbench": ("drawbench.csv", f"Prompts,Category\r\n{text},A\r\n"),
        "t2icompbench": ("own.txt", f"{text}\r\n"),
        "tifa160": ("tifa160-dev-anns.csv", HEADER + row("1", text, "1", "0", f"{text}?")),
        "csv": ("metadata.csv", f'caption\n"{text}"\n'),
    }
    for name, (file, content) in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(content.encode())
        whole = {} if name == "csv" else {"whole": False}
        found = open_data_set(name, tmp_path / name, **whole).prompts().prompts
        assert [prompt.text for prompt in found] == [text], name
        assert [q.text for p in found for q in p.questions] == [f"{text}?"] * (name == "tifa160")
    (tmp_path / "drawbench" / "drawbench.csv").unlink()
    (tmp_path / "drawbench" / "drawbench.txt").write_bytes(f"{text}\r\n \r\nc\r\n".encode())
    found = open_data_set("drawbench", tmp_path / "drawbench", whole=False)
    assert asked(found) == [("0", text, ""), ("1", "c", "")]


def test_prompts_need_ids_of_their_own() -> None:
    with pytest.raises(ValueError, match="the prompt id 'a' is there twice"):
        Prompts("own", (Prompt("a", "one"), Prompt("a", "two")))
    one = Prompts("own", (Prompt("a", "one"),)).fingerprint
    for other in (Prompt("b", "one"), Prompt("a", "two"), Prompt("a", "one", group="g")):
        assert Prompts("own", (other,)).fingerprint != one


@pytest.mark.parametrize("name", ["tifa160", "partiprompts", "drawbench", "t2icompbench"])
def test_files_that_are_no_text(tmp_path: Path, name: str) -> None:
    file = {
        "tifa160": "tifa160-dev-anns.csv",
        "partiprompts": "PartiPrompts.tsv",
        "drawbench": "d.csv",
        "t2icompbench": "color_val.txt",
    }[name]
    (tmp_path / file).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text that can be read"):
        open_data_set(name, tmp_path, whole=False).prompts()
    if name != "t2icompbench":
        (tmp_path / file).write_text("a,b\n1,2\n")
        with pytest.raises(UserError, match="has no column .* in its first line"):
            open_data_set(name, tmp_path, whole=False).prompts()
