"""One `metadata.csv`, read as a set of pictures, as a data set and as a plan's candidate."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etude.core.errors import UserError
from etude.evaluation.datasets import Prompt, Prompts, open_data_set
from etude.evaluation.decoding import Form
from etude.evaluation.planned.folders import PromptedFolder
from etude.evaluation.sets import FolderPictures, Stages

FORM = Form(0, "crop", 1)


def folder(path: Path, table: str | bytes) -> Path:
    """Four pictures and a table; picture i is filled with i."""
    path.mkdir()
    for i in range(4):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(path / f"{i}.png")
    (path / "metadata.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    return path


def prompts(path: Path) -> Prompts:
    found = open_data_set("folder", path).prompts()
    assert found is not None
    return found


TABLE = (
    "file_name,label,group\n0.png,dog,north\n1.png,cat,north\n2.png,dog,south\n3.png,cat,north\n"
)


def test_a_class_in_several_groups_needs_a_prompt_id(tmp_path) -> None:
    real = prompts(folder(tmp_path / "real", TABLE))
    assert {(prompt.text, prompt.label) for prompt in real.prompts} == {("", 0), ("", 1)}
    by_class = folder(tmp_path / "a", "file_name,label\n0.png,dog\n1.png,cat\n")
    with pytest.raises(UserError, match="has 'dog' in several groups; give a column prompt_id"):
        PromptedFolder(by_class, real, 2, FORM)
    by_id = folder(tmp_path / "b", "file_name,prompt_id\n0.png,2.png\n1.png,1.png\n3.png,0.png\n")
    read = PromptedFolder(by_id, real, 3, FORM).read(0, 3, Stages())
    assert read.groups == ["south", "north", "north"] and read.labels.tolist() == [1, 0, 1]
    # A class of one group is clear, whatever others are; and nothing said is nothing known.
    clear = PromptedFolder(folder(tmp_path / "c", "file_name,label\n0.png,cat\n"), real, 1, FORM)
    assert clear.read(0, 1, Stages()).groups == ["north"]
    bare = PromptedFolder(folder(tmp_path / "d", "file_name\n0.png\n"), real, 1, FORM)
    assert not bare.knows_prompts
    wordless = Prompts("own", (Prompt("a", "", group="x"), Prompt("b", "", group="y")))
    assert not PromptedFolder(tmp_path / "d", wordless, 1, FORM).knows_prompts


def test_three_readers_of_a_table_agree(tmp_path) -> None:
    """A byte-order mark, blanks, names with "./", rows without a file, a cell on two lines."""
    table = (
        "\ufefffile_name,caption,group\r\n./2.png, a\u2028b ,x\r\n,nothing,y\r\n"
        '0.png,"two\r\nlines",z\r\n3.png\r\n'
    )
    path = folder(tmp_path / "set", table)
    read = FolderPictures(path, channels=1).read(0, 3, Stages())
    assert read.keys == ["0.png", "2.png", "3.png"] and read.groups == ["z", "x", ""]
    asked = prompts(folder(tmp_path / "again", table.replace("3.png", "3.png,more,w")))
    assert [prompt.text for prompt in asked.prompts] == ["two\nlines", "a\u2028b", "more"]
    candidate = PromptedFolder(
        folder(tmp_path / "drawn", table.replace("3.png", "")), asked, 2, FORM
    )
    assert [prompt.id for prompt in candidate.asked(0, 2)] == ["0.png", "2.png"]
    assert candidate.read(0, 2, Stages()).groups == ["z", "x"]


def test_a_table_that_says_it_of_some_pictures_is_refused(tmp_path) -> None:
    real = prompts(folder(tmp_path / "real", TABLE))
    some = folder(tmp_path / "a", "file_name,prompt_id\n0.png,2.png\n1.png,\n")
    with pytest.raises(UserError, match="not say what 1.png was drawn of and says it of others"):
        PromptedFolder(some, real, 2, FORM)
    numbered = folder(tmp_path / "b", "file_name,label\n0.png,0\n1.png,1\n")
    with pytest.raises(UserError, match="drawn of '0', which is none of the 4 prompts that the"):
        PromptedFolder(numbered, real, 2, FORM)
    # Of prompts without classes a label says nothing.
    asked = Prompts("own", (Prompt("a", "a cat"), Prompt("b", "a dog")))
    assert not PromptedFolder(numbered, asked, 2, FORM).knows_prompts


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file_name,caption\n0.png,été\n".encode("latin-1"), "is not UTF-8 text"),
        (f"file_name,caption\n0.png,{'x' * 140_000}\n", "line 2: field larger than field limit"),
        (f"file_name,{'x' * 140_000}\n0.png,a\n", "line 1: field larger than field limit"),
        ("file,caption\n0.png,a\n", "has no column file_name in its first line"),
        ("", "has no column file_name in its first line"),
        ("file_name,caption\n", "names no picture below its first line"),
        ("file_name,caption\n,a\n", "names no picture below its first line"),
    ],
    ids=["latin-1", "long cell", "long column", "other column", "empty", "header", "no file"],
)
def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path, table, said) -> None:
    asked = prompts(folder(tmp_path / "real", TABLE))
    path = folder(tmp_path / "set", table)
    for read in (
        lambda: FolderPictures(path),
        lambda: prompts(path),
        lambda: PromptedFolder(path, asked, 4, FORM),
    ):
        with pytest.raises(UserError, match=f"metadata.csv,? {said}") as caught:
            read()
        assert "\n" not in str(caught.value)
