"""Addresses as people write them and peers gossip them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.addresses import Address, parse_address, parse_listen_address, reachable_hosts
from p2pcoord.errors import RemoteError, UserError

PEER = "12D3KooWGzRMZtYqtw1qPWef2iPWEwZo6ZcnnucMzUozxWGqo24U"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.7:4001", Address("192.0.2.7", 4001)),
        ("[2001:db8::7]:4001", Address("2001:db8::7", 4001)),
        ("lab-1.example.org:80", Address("lab-1.example.org", 80)),
        ("lab:65535", Address("lab", 65535)),
        ("/ip4/192.0.2.7/tcp/4001", Address("192.0.2.7", 4001)),
        ("/ip6/::1/tcp/1", Address("::1", 1)),
        ("/dns4/lab/tcp/4001", Address("lab", 4001)),
        (f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}", Address("192.0.2.7", 4001, PEER)),
        (f"/dns/lab.example.org/tcp/4001/p2p/{PEER}", Address("lab.example.org", 4001, PEER)),
    ],
)
def test_what_is_written_is_understood(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(expected.multiaddr()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lab",
        ":4001",
        "lab:",
        "lab:port",
        "lab:70000",
        "lab:-1",
        "lab:٤٠٠١",
        "2001:db8::7:4001",
        "a b:1",
        "-lab:1",
        "x" * 600,
        "/ip4/192.0.2.7",
        "/ip4/192.0.2.7/udp/4001",
        "/ip4/192.0.2.7/tcp/4001/ws",
        "/ip4/lab/tcp/4001",
        "/ip4/::1/tcp/4001",
        "/ip4/192.0.2.7/tcp/4001/p2p/nobody",
        "/ip4/192.0.2.7/tcp/4001/p2p/",
        "/onion/abc/tcp/1",
        "/",
    ],
)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(RemoteError) as refused:
        parse_address(text)
    assert refused.value.kind == "bad_address"
    with pytest.raises(UserError, match=r"^--listen "):
        parse_listen_address(text)


@given(st.text(max_size=80) | st.text(alphabet="/ip4dns.:p2[]0", max_size=40))
def test_no_text_at_all_breaks_it(text: str) -> None:
    try:
        address = parse_address(text)
    except RemoteError:
        return
    assert parse_address(address.multiaddr()) == address


@given(st.ip_addresses(), st.integers(0, 65_535), st.none() | st.just(PEER))
def test_every_ip_address_and_port_survives(ip: object, port: int, peer: str | None) -> None:
    address = Address(str(ip), port, peer)
    assert parse_address(address.multiaddr()) == address
    assert parse_address(str(address)) == Address(str(ip), port)


def test_only_an_ip_address_can_be_listened_on() -> None:
    assert parse_listen_address("/ip4/0.0.0.0/tcp/4001") == Address("0.0.0.0", 4001)
    for text in ("/dns/lab/tcp/4001", f"/ip4/0.0.0.0/tcp/4001/p2p/{PEER}", "localhost:4001"):
        with pytest.raises(UserError, match="give an IP address") as refused:
            parse_listen_address(text)
        assert refused.value.exit_code == 2


def test_a_wildcard_listener_is_reached_by_the_addresses_of_real_interfaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket
    from types import SimpleNamespace

    import psutil

    def entries(*addresses: str) -> list[SimpleNamespace]:
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [SimpleNamespace(family=families[":" in text], address=text) for text in addresses]

    interfaces = {
        "lo": entries("127.0.0.1", "::1"),
        "eth0": entries("192.0.2.7", "2001:db8::7", "fe80::1%eth0"),
        "docker0": entries("172.17.0.1"),
        "br-0a1b": entries("172.18.0.1"),
        "wlan0": entries("169.254.3.4", "10.0.0.5"),
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    assert reachable_hosts("0.0.0.0") == ["192.0.2.7", "10.0.0.5"]
    assert reachable_hosts("::") == ["2001:db8::7"]
    assert reachable_hosts("172.17.0.1") == ["172.17.0.1"]
    monkeypatch.setattr(
        psutil, "net_if_addrs", lambda: {"lo": interfaces["lo"], "docker0": interfaces["docker0"]}
    )
    assert reachable_hosts("0.0.0.0") == ["127.0.0.1"]
    assert reachable_hosts("::") == ["::1"]
