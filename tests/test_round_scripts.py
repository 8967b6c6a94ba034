"""Every script under tests/scripts/rounds is a test: peers that train say what the script says they say.

UPDATE_SCRIPTS=1 pytest tests/test_round_scripts.py        writes what they say now into the scripts: read the difference
"""

import os
from pathlib import Path

import pytest

from tests.round_runner import play, scripts
from tests.script_runner import parse, render

UPDATE = os.environ.get("UPDATE_SCRIPTS") == "1"


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_the_peers_say_what_the_script_says(path: Path) -> None:
    played = render(play(parse(path.read_text())))
    if UPDATE:
        path.write_text(played)
    assert played == path.read_text()


def test_there_are_scripts_about_rounds() -> None:
    assert len(scripts()) >= 5
