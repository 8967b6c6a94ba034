"""What a run is: what all its members agree on from its first moment, and the hash that names it.

Theory of operation
    `RunSettings` (`p2pcoord.run_sections`) is what the founder chooses; `RunConfig` adds who founded the run, a nonce and the
    workload. The run id is the hash of the config's canonical CBOR, so a run cannot change what it is; whoever knows the id can
    check the config. Names of sections and reader are found here too, so that who uses a run needs one module.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Final

import msgspec

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.identity import DOMAIN, PROTOCOL_VERSION
from p2pcoord.run_file import parse_run_file
from p2pcoord.run_sections import (
    MAX_CONFIG_BYTES,
    Aggregation,
    Coordination,
    Data,
    Local,
    LocalOptimizer,
    Optimization,
    Participation,
    RunSettings,
    Strategy,
    Synchronization,
    contradictions,
    spoken,
)
from p2pcoord.wire import decode as decode_bytes
from p2pcoord.wire import encode as encode_value

__all__ = [
    "NONCE_BYTES",
    "Aggregation",
    "Coordination",
    "Data",
    "Local",
    "LocalOptimizer",
    "Optimization",
    "Participation",
    "RunConfig",
    "RunSettings",
    "Strategy",
    "Synchronization",
    "decode",
    "derive_seed",
    "encode",
    "found_run",
    "parse_run_file",
    "run_id",
]

NONCE_BYTES: Final = 16
"""Two runs of one founder never share an id by accident."""


class RunConfig(RunSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that all members of a run agree on from its first moment. `run_id` names it.

    `workload_spec` is the founder's --workload as its peers may use it too: "text", "module:Name" or "FILE.py:Name" (the file's
    name without its folder). `open`: whoever knows the run may join, without the secret.
    """

    founder: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    workload_spec: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    protocol: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = PROTOCOL_VERSION
    open: bool = False


def found_run(
    settings: RunSettings, *, founder: str, nonce: bytes, workload_spec: str, open: bool = False
) -> RunConfig:
    """The config of a new run. Raises LocalError when it would not pass `decode`."""
    sections = {name: getattr(settings, name) for name in RunSettings.__struct_fields__}
    config = RunConfig(**sections, founder=founder, nonce=nonce, workload_spec=workload_spec, open=open)
    try:
        decode(encode(config))
    except RemoteError as error:
        raise LocalError(f"this is no run config: {error}") from None
    return config


def encode(config: RunConfig) -> bytes:
    """Canonical CBOR."""
    return encode_value(config)


def decode(data: bytes) -> RunConfig:
    """A config that a peer sent. Raises RemoteError as `wire.decode` does, and "out_of_range" for contradictions."""
    config = decode_bytes(data, RunConfig, limit=MAX_CONFIG_BYTES)
    for key, told in contradictions(config):
        raise RemoteError("out_of_range", f"{spoken(key)}: {told}")
    return config


def run_id(config: RunConfig) -> bytes:
    """Names the run: 32 bytes, SHA-256 over domain and canonical CBOR."""
    return sha256(DOMAIN + b"run\x00" + encode(config)).digest()


def derive_seed(run: bytes, *purpose: str | int | bytes) -> int:
    """A seed below 2**63 for one purpose, such as derive_seed(run, "shuffle", round, assignment). Streams are independent: one
    more draw in one moves nothing in another."""
    return (
        int.from_bytes(sha256(DOMAIN + b"seed\x00" + encode_value([run, *purpose])).digest()[:8], "big") >> 1
    )
