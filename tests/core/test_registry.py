"""Registries: found by name, by file, by entry point; two things never share a name."""

import sys
from pathlib import Path

import pytest

from etude.core.errors import UserError
from etude.core.registry import Registry, load_file

BUILT_IN = """
from {package} import THINGS

@THINGS.named("{name}")
def thing():
    return "{said}"
"""


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry whose package has the files first.py, holding `first`, and two.py, `second`."""
    package = tmp_path / "registered_things"
    package.mkdir()
    lines = "from etude.core.registry import Registry\n"
    lines += "THINGS = Registry('thing', 'registered_things', 'etude.no_such_group')\n"
    (package / "__init__.py").write_text(lines)
    for file, name in (("first", "first"), ("two", "second")):
        text = BUILT_IN.format(package="registered_things", name=name, said=f"said {name}")
        (package / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import registered_things

    yield registered_things.THINGS
    for name in [name for name in sys.modules if name.startswith("registered_things")]:
        del sys.modules[name]


def test_a_name_is_found_in_its_own_file_and_in_others(things: Registry) -> None:
    assert things.get("first")() == "said first"
    assert "registered_things.two" not in sys.modules  # nothing else was loaded for it
    assert things.get("second")() == "said second"
    assert things.names() == ["first", "second"]


def test_an_unknown_name_lists_the_known_ones(things: Registry) -> None:
    with pytest.raises(UserError, match="no thing 'third'; choose one of first, second"):
        things.get("third")


def test_a_file_of_somebodys_own(things: Registry, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(BUILT_IN.format(package="registered_things", name="mine", said="hello"))
    load_file(own)
    load_file(own)  # the same definition again
    assert things.get("mine")() == "hello"
    with pytest.raises(UserError, match="there is no file .*missing.py"):
        load_file(tmp_path / "missing.py")


def test_a_file_that_is_not_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("first = 1\ndef second(:\n")
    with pytest.raises(UserError, match=r"own.py, line 2 is not Python \(invalid syntax\); mend"):
        load_file(own)
    text = tmp_path / "own.txt"
    text.write_text("first = 1\n")
    with pytest.raises(UserError, match="own.txt is no Python file; its name must end in .py"):
        load_file(text)
    own.write_text("raise KeyError('theirs')\n")  # with its traceback
    with pytest.raises(KeyError, match="theirs"):
        load_file(own)


def test_two_files_with_one_name_are_refused(things: Registry, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(BUILT_IN.format(package="registered_things", name="first", said="hello"))
    things.get("first")
    with pytest.raises(UserError, match="other.py .* has the name of .*first.py"):
        load_file(other)
