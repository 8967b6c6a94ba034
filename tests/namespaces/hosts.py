"""Machines that are network namespaces: each with an address of its own, all on one switch, and faults as a network has them.

Theory of operation
    A host is a namespace with one interface, a veth pair whose other end is a port of a bridge. All of it is made by `ip`, has
    names of this process and is gone after `with`; the bridge has no address, so nothing here meets the machine's own network.

    split, isolate, heal    each host's iptables drops what comes from the others; where that program is missing, ports move to
                            bridges of their own. Either way packets vanish in silence, in both directions, and no host sees
                            its cable pulled. What was in flight is lost, connections stay open
    refuse_inbound          a firewall's rule: whoever dials the host's TCP port gets no answer; what it dials itself works
    limit                   tc's token bucket in front of the host's own sending

Only iproute2 is needed, and root: a machine that lacks one of them skips these tests and says why (`missing`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

MAX_HOSTS: Final = 64
COMMAND_TIMEOUT_S: Final = 20.0


def missing() -> str:
    """Why there can be no hosts on this machine ("" when there can)."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"network namespaces need {tool} (iproute2)"
    name = f"pctry{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return ""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


class Host:
    """One machine: `prefix` in front of a command runs it there, with the command's own process id."""

    def __init__(self, number: int, token: str) -> None:
        self.number = number
        self.namespace = f"pc{token}-{number}"
        self.port_device = f"pc{token}v{number}"
        """The switch's end of its cable, in the machine's own namespace."""
        self.address = f"10.213.0.{number + 1}"

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def ip(self, *command: str) -> str:
        return _run("ip", "-n", self.namespace, *command)

    def traffic(self) -> tuple[int, int]:
        """Bytes that its interface received and sent so far, all headers included."""
        statistics = f"/sys/class/net/{self.port_device}/statistics"
        sent, received = (
            int(_read(f"{statistics}/{name}")) for name in ("rx_bytes", "tx_bytes")
        )  # the switch receives what the host sends
        return received, sent

    def refuse_inbound(self, port: int) -> None:
        """From now on nobody's TCP packets to this port arrive."""
        # Before the table of local addresses, which the kernel puts first: only there does a rule stop what is for this host.
        self.ip("rule", "add", "pref", "10", "lookup", "local")
        self.ip("rule", "del", "pref", "0")
        self.ip("rule", "add", "pref", "5", "iif", "eth0", "ipproto", "tcp", "dport", str(port), "blackhole")

    def drop_from(self, others: Sequence[Host]) -> None:
        """From now on nothing arrives from these hosts, and all else does. (Dropping on the way in only: what a host may not
        even send is an error to it, and no silence.)"""
        _run(*self.prefix, "iptables", "-w", "-F", "INPUT")
        for other in others:
            _run(*self.prefix, "iptables", "-w", "-A", "INPUT", "-s", other.address, "-j", "DROP")

    def limit(self, megabits_per_s: float) -> None:
        """Bounds what it sends."""
        rate = f"{megabits_per_s:g}mbit"
        _run(
            "tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root", "tbf",
            "rate", rate, "burst", "64kb", "latency", "200ms",
        )  # fmt: skip


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


class Network:
    """Made by `network`."""

    def __init__(self, count: int, *, iptables: bool) -> None:
        if not 1 <= count <= MAX_HOSTS:
            raise ValueError(f"1 to {MAX_HOSTS} hosts, not {count}")
        self._iptables = iptables
        self._token = secrets.token_hex(2)
        self._bridges: list[str] = []
        self.hosts = [Host(number, self._token) for number in range(count)]

    def _bridge(self, number: int) -> str:
        while len(self._bridges) <= number:
            name = f"pc{self._token}b{len(self._bridges)}"
            _run("ip", "link", "add", name, "type", "bridge")
            self._bridges.append(name)
            _run("ip", "link", "set", name, "up")
        return self._bridges[number]

    def _make(self) -> None:
        bridge = self._bridge(0)
        for host in self.hosts:
            _run("ip", "netns", "add", host.namespace)
            _run(
                "ip", "link", "add", host.port_device, "type", "veth",
                "peer", "name", "eth0", "netns", host.namespace,
            )  # fmt: skip
            _run("ip", "link", "set", host.port_device, "master", bridge, "up")
            host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", "eth0", "up")

    def _remove(self) -> None:
        for host in self.hosts:
            with suppress(OSError):
                _run("ip", "link", "del", host.port_device)
            with suppress(OSError):
                _run("ip", "netns", "del", host.namespace)
        for bridge in self._bridges:
            with suppress(OSError):
                _run("ip", "link", "del", bridge)

    def split(self, *groups: Sequence[Host]) -> None:
        """From now on only hosts of one group hear each other; who is in no group stays where it is."""
        for number, group in enumerate(groups):
            if self._iptables:
                unheard = [other for others in groups if others is not group for other in others]
                for host in group:
                    host.drop_from(unheard)
                continue
            bridge = self._bridge(number)
            for host in group:
                _run("ip", "link", "set", host.port_device, "master", bridge)

    def isolate(self, host: Host) -> None:
        """Nobody hears this host, and it hears nobody."""
        self.split([other for other in self.hosts if other is not host], [host])

    def heal(self) -> None:
        self.split(self.hosts)


def has_iptables() -> bool:
    return shutil.which("iptables") is not None


@contextmanager
def network(count: int, *, iptables: bool | None = None) -> Iterator[Network]:
    """`count` hosts that hear each other. Their processes must have ended before this does. `iptables`: whether it cuts them
    from each other; by default where it is there."""
    made = Network(count, iptables=has_iptables() if iptables is None else iptables)
    try:
        made._make()
        yield made
    finally:
        made._remove()
