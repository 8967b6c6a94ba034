"""`p2pcoord export`: the newest certified model of a directory, copied to where a person wants it.

The node replaces DIR/model/latest.safetensors whole after each certificate, so the file that was opened is one version, also
while a node runs. The copy appears under its name whole or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from node.storage.directory import check_format
from node.storage.model_checksum import DamagedModel, check_model
from node.storage.whole_file import whole_file
from p2pcoord.errors import UserError

MODEL_FILE: Final = Path("model/latest.safetensors")


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
                f"{directory / MODEL_FILE} is damaged ({damaged}). Start the node: it writes the file anew from the certified "
                "state"
            ) from None
        try:
            with whole_file(target) as temporary, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return version
