"""`p2pcoord export`: the newest certified model of a directory, copied to where a person wants it.

The node replaces DIR/model/latest.safetensors whole after each certificate, so the file that was opened is one version, also
while a node runs. The copy appears under its name whole or not at all.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

from node.storage.directory import check_format
from node.storage.log_replay import Replay, Wrong
from node.storage.model_checksum import DamagedModel, check_model
from node.storage.store import Store
from node.storage.whole_file import whole_file
from p2pcoord.consensus.log import CorruptLog
from p2pcoord.errors import UserError

MODEL_FILE: Final = Path("model/latest.safetensors")
WRITTEN_ANEW: Final = "Start the node: it writes the file anew"


def export_latest(directory: Path, target: Path) -> int:
    """Copies the model, durably; its version.

    Raises UserError when there is none yet, when it is damaged, or when the target cannot be written.
    """
    check_format(directory)
    if target.suffix != ".safetensors":
        raise UserError(
            f"{target}: the model is a safetensors file, its name ends with .safetensors", exit_code=2
        )
    try:
        source = (directory / MODEL_FILE).open("rb")
    except FileNotFoundError:
        if version := _certified_version(directory):
            raise UserError(
                f"{directory / MODEL_FILE} is missing, of version {version}. {WRITTEN_ANEW} from the certified state"
            ) from None
        raise UserError(
            f"{directory} has no certified model yet: it comes with the first certified version"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {directory / MODEL_FILE}: {error.strerror or error}") from error
    with source:
        try:
            version = check_model(source).version
        except DamagedModel as damaged:
            raise UserError(
                f"{directory / MODEL_FILE} is damaged ({damaged}). {WRITTEN_ANEW} from the certified state"
            ) from None
        try:
            with whole_file(target) as temporary, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return version


def _certified_version(directory: Path) -> int:
    """The newest version that the log certifies, as far as it can be read."""
    replay = Replay()
    with Store.open(directory, read_only=True) as store, suppress(CorruptLog, Wrong):
        for payload in store.recovered().payloads:
            replay.take(payload)
    return replay.version
