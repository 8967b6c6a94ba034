"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from node.storage.whole_file import is_unfinished, temporary_beside, whole_file


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_gets_its_name_when_it_is_complete_and_the_old_one_stays_until_then(
    tmp_path: Path, durable: bool
) -> None:
    path = tmp_path / "name"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with whole_file(path, durable=durable) as temporary:
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["name"]


@pytest.mark.parametrize("durable", [False, True])
def test_what_fails_leaves_nothing_and_changes_nothing(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "name"
    path.write_text("old")

    def fill() -> None:
        with whole_file(path, durable=durable) as temporary:
            temporary.write_text("half of")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fill()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["name"]


def test_a_file_that_must_not_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "name"
    path.write_text("old")
    with pytest.raises(FileExistsError), whole_file(path, replace=False) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["name"]


def test_bytes_are_synced_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("rename"), rename(a, b)))
    with whole_file(tmp_path / "name") as temporary:
        temporary.write_text("text")
    assert steps == ["sync", "rename", "sync"]


def test_it_is_private_from_its_first_byte_when_that_is_asked(tmp_path: Path) -> None:
    with whole_file(tmp_path / "key", mode=0o600) as temporary:
        assert temporary.stat().st_mode & 0o077 == 0
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_what_a_crash_left_is_known_by_its_name() -> None:
    left = temporary_beside(Path("format")).name
    assert is_unfinished(left, "format")
    assert not is_unfinished(left, "form")
    assert not is_unfinished("format", "format")
