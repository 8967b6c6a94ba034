"""Addresses as people and peers write them, and the ones this machine can be reached at.

A peer's address is a TCP multiaddr, `/ip4/192.0.2.7/tcp/4001`, also with /ip6, /dns, /dns4 or /dns6, and optionally
ending in `/p2p/PEER-ID`; people may write `host:port` (`[::1]:4001` for IPv6).
"""

from __future__ import annotations

import ipaddress
import re
import socket

import msgspec

from p2pcoord.errors import RemoteError, UserError
from p2pcoord.identity import public_key_of

# A name of 253 characters, a peer id of 52 and what is between them.
MAX_ADDRESS_LENGTH = 512

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")

# Interfaces that lead nowhere but into this machine: container and virtual machine bridges and their ends.
_BRIDGES = (
    "docker",
    "br-",
    "veth",
    "virbr",
    "lxc",
    "lxd",
    "cni",
    "flannel",
    "cali",
    "podman",
    "vmnet",
    "vboxnet",
)


class Address(msgspec.Struct, frozen=True):
    """Where to open a TCP connection, and whom to expect there (None: whoever proves an identity)."""

    host: str
    port: int
    peer: str | None = None

    def multiaddr(self) -> str:
        suffix = f"/p2p/{self.peer}" if self.peer else ""
        return f"/{_kind(self.host)}/{self.host}/tcp/{self.port}{suffix}"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Raises RemoteError("bad_address") with what is wrong: addresses come from people and from peers alike."""
    if len(text) > MAX_ADDRESS_LENGTH:
        raise RemoteError("bad_address", f"an address of {len(text)} characters")
    return _from_multiaddr(text) if text.startswith("/") else _from_host_port(text)


def _from_multiaddr(text: str) -> Address:
    parts = text.strip("/").split("/")
    if len(parts) not in {4, 6} or parts[2] != "tcp" or (len(parts) == 6 and parts[4] not in {"p2p", "ipfs"}):
        raise RemoteError(
            "bad_address", f"{text!r} is not like /ip4/192.0.2.7/tcp/4001 or .../tcp/4001/p2p/ID"
        )
    kind, host, _, port = parts[:4]
    if kind not in {"ip4", "ip6", "dns", "dns4", "dns6"} or (kind.startswith("ip") and _kind(host) != kind):
        raise RemoteError("bad_address", f"{host!r} in {text!r} is no {kind} address")
    peer = parts[5] if len(parts) == 6 else None
    if peer is not None:
        try:
            public_key_of(peer)
        except RemoteError as error:
            raise RemoteError("bad_address", f"{text!r}: {error.detail}") from error
    return Address(_checked_host(host, text), _port(port, text), peer)


def _from_host_port(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise RemoteError("bad_address", f"{text!r}: write an IPv6 address as [address]:port")
    if not colon or not host:
        raise RemoteError(
            "bad_address", f"{text!r} is neither host:port nor a multiaddr like /ip4/192.0.2.7/tcp/4001"
        )
    return Address(_checked_host(host, text), _port(port, text))


def _kind(host: str) -> str:
    try:
        return f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        return "dns"


def _checked_host(host: str, text: str) -> str:
    if _kind(host) == "dns" and (len(host) > 253 or not _HOST_NAME.fullmatch(host)):
        raise RemoteError("bad_address", f"{host[:64]!r} in {text!r} is no host name")
    return host


def _port(port: str, text: str) -> int:
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65_535):
        raise RemoteError("bad_address", f"{port[:16]!r} in {text!r} is no port")
    return int(port)


def parse_listen_address(text: str) -> Address:
    """An address to listen on; the host is an IP address of this machine or 0.0.0.0 or ::. Raises UserError."""
    try:
        address = parse_address(text)
    except RemoteError as error:
        raise UserError(f"--listen {text}: {error.detail}", exit_code=2) from error
    if _kind(address.host) == "dns" or address.peer is not None:
        raise UserError(
            f"--listen {text}: give an IP address of this machine, such as /ip4/0.0.0.0/tcp/4001", exit_code=2
        )
    return address


def reachable_hosts(listen_host: str) -> list[str]:
    """The IP addresses under which others find a listener on `listen_host`, best first.

    For a wildcard: every address of a LAN or the internet, without loopback, link-local and container bridges; loopback
    alone when there is nothing else.
    """
    if not ipaddress.ip_address(listen_host).is_unspecified:
        return [listen_host]
    import psutil

    # A dual-stack listener on :: takes IPv4 too, but trio opens ours with IPV6_V6ONLY.
    family = socket.AF_INET6 if ":" in listen_host else socket.AF_INET
    hosts = []
    for name, entries in psutil.net_if_addrs().items():
        if name.startswith(_BRIDGES):
            continue
        for entry in entries:
            if entry.family == family:
                ip = ipaddress.ip_address(entry.address.split("%")[0])
                if not (ip.is_loopback or ip.is_link_local):
                    hosts.append(str(ip))
    return hosts or ["::1" if family == socket.AF_INET6 else "127.0.0.1"]
