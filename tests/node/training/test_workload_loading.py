"""How a workload is named and found, and that every mistake is told as the user's."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

import pytest

from node.training.workload_loading import load_workload, parse_spec, source_hash, user_code
from p2pcoord.errors import UserError

GOOD = """
import p2pcoord
from neighbour import WIDTH

class Base(p2pcoord.Workload):
    def model(self): return WIDTH
    def data(self, split): return []

class Good(Base):
    def loss(self, model, batch): return 0

NotOne = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "torch.py"  # a name that is taken already
    path.write_text(GOOD)
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return path


def test_a_file_and_its_neighbours_are_found_whatever_the_file_is_called(file: Path) -> None:
    spec = parse_spec(f"{file}:Good")
    assert (spec.file, spec.name, spec.portable) == (str(file), "Good", "torch.py:Good")
    workload = load_workload(spec)
    assert workload().model() == 5
    assert source_hash(workload) == sha256(GOOD.encode()).digest()


def test_line_ends_of_another_system_do_not_change_the_source_hash(file: Path) -> None:
    unix = source_hash(load_workload(parse_spec(f"{file}:Good")))
    file.write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert source_hash(load_workload(parse_spec(f"{file}:Good"))) == unix


def test_the_built_in_workload_has_a_short_name() -> None:
    spec = parse_spec("text")
    assert (spec.module, spec.name, spec.portable) == ("node.training.text_workload", "Text", "text")
    assert load_workload(spec).__name__ == "Text"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("digits", "expected FILE.py:Name, module:Name or the built-in text"),
        ("", "expected FILE.py:Name, module:Name or the built-in text"),
        ("missing.py:Digits", "there is no file missing.py"),
        ("missing.py", "there is no file missing.py"),
        ("a-b:Name", "'a-b' is neither a FILE.py nor a module's name"),
        ("a.py:not a name", "'not a name' cannot be a class's name"),
    ],
)
def test_a_form_that_is_none_is_a_usage_error(text: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_spec(text)
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_without_a_class_lists_those_it_has(file: Path) -> None:
    with pytest.raises(UserError, match=r"say which class of the file: .*torch\.py:Base, .*torch\.py:Good"):
        parse_spec(str(file))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Godo", "there is no class Godo in it; did you mean Good"),
        ("NotOne", "NotOne is no subclass of p2pcoord.Workload"),
        ("Base", "Base does not define loss()"),
    ],
)
def test_a_class_that_is_missing_or_none_of_ours_is_named(file: Path, name: str, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("(", r"\(").replace(")", r"\)")) as caught:
        load_workload(parse_spec(f"{file}:{name}"))
    assert caught.value.exit_code == 2


def test_a_missing_module_is_told_apart_from_a_module_that_misses_something(file: Path) -> None:
    with pytest.raises(UserError, match="there is no module no_such_thing: install it"):
        load_workload(parse_spec("no_such_thing:Name"))
    (file.parent / "broken_module.py").write_text("import no_such_thing\n")
    sys.path.insert(0, str(file.parent))
    with pytest.raises(UserError) as caught:
        load_workload(parse_spec("broken_module:Name"))
    assert 'broken_module.py", line 1' in str(caught.value)
    assert "No module named 'no_such_thing'" in str(caught.value)
    assert str(caught.value).count('File "') == 1


@pytest.mark.parametrize("code", ["def f(:\n", "raise SystemExit(3)\n", "1 / 0\n"])
def test_whatever_a_file_does_when_imported_is_its_own_traceback(file: Path, code: str) -> None:
    file.write_text(code)
    with pytest.raises(UserError, match=r"importing torch\.py of the workload failed") as caught:
        load_workload(parse_spec(f"{file}:Good"))
    assert str(caught.value).count('File "') == 1
    assert "workload_loading.py" not in str(caught.value)


def test_a_user_error_from_a_workload_stays_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^say it so$"), user_code("loss()"):
        raise UserError("say it so")
