"""Every script under tests/scripts is a test: the peers say what the script says they say.

UPDATE_SCRIPTS=1 pytest tests/test_scripts.py        writes what they say now into the scripts: read the difference
"""

import os
from pathlib import Path

import pytest

from tests.script_runner import parse, play, render, scripts

FOLDER = Path(__file__).parent / "scripts"
UPDATE = os.environ.get("UPDATE_SCRIPTS") == "1"


@pytest.mark.parametrize("path", scripts(), ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_peers_say_what_the_script_says(path: Path) -> None:
    text = path.read_text()
    played = render(play(parse(text)))
    if UPDATE:
        path.write_text(played)
    assert played == path.read_text()


def test_there_are_scripts_for_every_part_of_the_agreement() -> None:
    folders = {path.parent.name for path in scripts()}
    parts = {"catch_up", "committees", "election", "following", "participation", "quorum", "replication"}
    assert folders >= parts
