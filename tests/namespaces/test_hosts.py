"""The made-up machines themselves: what is dropped is dropped in silence, and comes back."""

import socket
import subprocess
import sys

import pytest

from tests.namespaces.hosts import Host, has_iptables, missing, network

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ECHO = """
import socket
with socket.create_server(("0.0.0.0", 4001)) as server:
    print("ready", flush=True)
    while True:
        with server.accept()[0] as connection:
            connection.sendall(connection.recv(1))
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 4001), timeout=float(sys.argv[2])) as connection:
    connection.sendall(b"x")
    assert connection.recv(1) == b"x"
"""


def asks(asker: Host, asked: Host, timeout_s: float = 1.0) -> str:
    """ "" when it was answered, else the name of what went wrong."""
    done = subprocess.run(
        [*asker.prefix, sys.executable, "-c", ASK, asked.address, str(timeout_s)],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.mark.parametrize(
    "iptables",
    [False, pytest.param(True, marks=pytest.mark.skipif(not has_iptables(), reason="no iptables here"))],
)
def test_hosts_hear_each_other_until_they_are_split_and_again_when_they_are_healed(iptables: bool) -> None:
    with network(3, iptables=iptables) as made:
        first, second, third = made.hosts
        with subprocess.Popen([*first.prefix, sys.executable, "-c", ECHO], stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                assert asks(second, first) == asks(third, first) == ""
                made.split([first, second], [third])
                assert asks(second, first) == ""
                assert asks(third, first) in (
                    "TimeoutError: timed out",
                    "OSError: [Errno 113] No route to host",
                )
                made.heal()
                assert asks(third, first, 5.0) == ""
                made.isolate(first)
                assert asks(second, first)
                made.heal()
                first.refuse_inbound(4001)
                assert asks(second, first) == "TimeoutError: timed out"
                received, sent = first.traffic()
                assert received > 0
                assert sent > 0
            finally:
                server.kill()


def test_a_host_that_refuses_inbound_connections_still_makes_its_own() -> None:
    with network(2) as made:
        first, second = made.hosts
        second.refuse_inbound(4001)
        with subprocess.Popen([*first.prefix, sys.executable, "-c", ECHO], stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                assert asks(second, first) == ""
            finally:
                server.kill()


def test_nothing_is_left_of_hosts() -> None:
    with network(2) as made:
        names = [host.port_device for host in made.hosts]
        assert set(names) <= {name for _, name in socket.if_nameindex()}
    assert not set(names) & {name for _, name in socket.if_nameindex()}
