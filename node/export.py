"""`p2pcoord export`: the newest certified model of a directory, copied to where a person wants it.

The node replaces DIR/model/latest.safetensors whole after each certificate, so the file that was opened is one version, also
while a node runs. The copy appears under its name whole or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import msgspec

from node.directory import check_format
from node.whole_file import whole_file
from p2pcoord.errors import UserError

MODEL_FILE: Final = Path("model/latest.safetensors")

MAX_HEADER_BYTES: Final = 64 << 20
"""Of a safetensors file: names and shapes, some 100 bytes a tensor. Their own limit is 100 MB."""


def export_latest(directory: Path, target: Path) -> str:
    """Copies the model, durably; the version that it says it is ("" when it does not say).

    Raises UserError when there is none yet, or when the target cannot be written.
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
        version = model_version(source)
        try:
            with whole_file(target) as temporary, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return version


def model_version(file: Any) -> str:
    """`p2pcoord_version` of the file's metadata; the file stands at its beginning before and after."""
    size = int.from_bytes(file.read(8), "little")
    try:
        header = msgspec.json.decode(file.read(size)) if size <= MAX_HEADER_BYTES else {}
        return str(header["__metadata__"]["p2pcoord_version"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""
    finally:
        file.seek(0)
