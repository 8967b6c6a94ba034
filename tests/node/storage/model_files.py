"""Model files as a node writes them, without a model."""

from __future__ import annotations

from pathlib import Path

import msgspec

from node.storage.export import MODEL_FILE
from node.storage.model_checksum import CHECKSUM, NO_CHECKSUM, seal


def write_model(directory: Path, version: int, state: str, tensors: bytes = bytes(100)) -> Path:
    """In this data directory."""
    metadata = {CHECKSUM: NO_CHECKSUM, "p2pcoord_version": str(version), "p2pcoord_state": state}
    header = msgspec.json.encode({"__metadata__": metadata})
    path = directory / MODEL_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + tensors)
    seal(path)
    return path
