"""Who sent a request, and how often it may: forwarding headers, Host, rates and bans."""

from __future__ import annotations

import pytest

from kalamdb.config import Settings
from kalamdb.errors import InvalidRequest
from kalamdb.server.guards import Bans, Guards, Peers, Rate, caller_key, networks
from kalamdb.testing.clock import SimulatedClock

LOCAL_HOST = {b"host": b"localhost:8080"}


def peers(trusted: tuple[str, ...] = (), health: tuple[str, ...] = (), hosts: tuple[str, ...] = ()) -> Peers:
    """Peers with networks written as texts."""
    return Peers(trusted=networks("trusted", trusted), health=networks("health", health), hosts=hosts)


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:1", b"127.0.0.1:8080", b"[::1]:8080", b"::1", b"localhost."]
)
@pytest.mark.parametrize("ip", ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_with_its_own_name_is_local(ip: str, host: bytes) -> None:
    assert peers().of(ip, {b"host": host}).is_local


@pytest.mark.parametrize(
    "host", [b"", b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example", b"a@localhost"]
)
def test_loopback_under_another_name_is_not_local(host: bytes) -> None:
    assert not peers().of("127.0.0.1", {b"host": host}).is_local
    assert not peers().of("127.0.0.1", {}).is_local


def test_allowed_hosts_are_names_of_this_server() -> None:
    assert peers(hosts=("DB.example.com",)).of("127.0.0.1", {b"host": b"db.example.com:80"}).is_local


@pytest.mark.parametrize(
    "name", [b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"forwarded", b"x-real-ip"]
)
def test_no_forwarded_request_is_local(name: bytes) -> None:
    for trusted in ((), ("127.0.0.0/8",)):
        assert not peers(trusted).of("127.0.0.1", {**LOCAL_HOST, name: b"127.0.0.1"}).is_local


def test_another_machine_is_not_local_whatever_it_says() -> None:
    assert not peers().of("10.0.0.5", LOCAL_HOST).is_local
    assert not peers(("10.0.0.0/8",)).of("10.0.0.5", {**LOCAL_HOST, b"x-forwarded-for": b"127.0.0.1"}).is_local


@pytest.mark.parametrize(
    ("header", "client"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("9.9.9.9, 1.2.3.4", "1.2.3.4"),
        ("9.9.9.9, 1.2.3.4, 10.1.1.1", "1.2.3.4"),
        ("1.2.3.4:4711", "1.2.3.4"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("10.2.2.2, 10.1.1.1", "10.2.2.2"),
    ],
)
def test_a_trusted_proxy_says_who_the_client_is(header: str, client: str) -> None:
    peer = peers(("10.0.0.0/8",)).of("10.0.0.5", {b"x-forwarded-for": header.encode()})
    assert (peer.ip, peer.is_certain) == (client, True)


@pytest.mark.parametrize("header", ["", "unknown", "1.2.3.4, nonsense"])
def test_what_a_proxy_does_not_say_stays_uncertain(header: str) -> None:
    peer = peers(("10.0.0.0/8",)).of("10.0.0.5", {b"x-forwarded-for": header.encode()})
    assert (peer.ip, peer.is_certain) == ("10.0.0.5", False)


def test_who_is_not_trusted_cannot_name_another_client() -> None:
    peer = peers(("10.0.0.0/8",)).of("5.5.5.5", {b"x-forwarded-for": b"1.2.3.4"})
    assert (peer.ip, peer.is_certain) == ("5.5.5.5", False)


def test_health_is_for_this_machine_and_listed_networks() -> None:
    asked = peers(trusted=("10.0.0.1",), health=("127.0.0.0/8", "10.0.0.0/8"))
    assert asked.may_ask_health(asked.of("127.0.0.1", LOCAL_HOST))
    assert asked.may_ask_health(asked.of("10.0.0.7", {b"host": b"db"}))
    assert not asked.may_ask_health(asked.of("10.0.0.7", {b"x-forwarded-for": b"10.0.0.8"}))
    assert not asked.may_ask_health(asked.of("127.0.0.1", {b"host": b"evil.example"}))
    assert not asked.may_ask_health(asked.of("11.0.0.7", LOCAL_HOST))
    assert not asked.may_ask_health(asked.of("10.0.0.1", {b"x-forwarded-for": b"127.0.0.1"}))
    assert asked.may_ask_health(asked.of("10.0.0.1", {b"x-forwarded-for": b"10.9.9.9"}))


def test_a_network_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="security.trusted_proxy_ranges: 'tenant'"):
        networks("security.trusted_proxy_ranges", ["tenant"])


def test_a_rate_allows_a_second_s_worth_at_once_and_then_one_by_one() -> None:
    clock = SimulatedClock()
    rate = Rate(10, clock)
    assert [rate.allow("a") for _ in range(12)] == [True] * 10 + [False] * 2
    assert rate.allow("b")
    assert rate.wait_s("a") == pytest.approx(0.1)
    clock.advance(0.11)
    assert [rate.allow("a") for _ in range(2)] == [True, False]
    clock.advance(5)
    assert sum(rate.allow("a") for _ in range(20)) == 10


def test_a_rate_keeps_a_bounded_number_of_keys_and_forgets_silent_ones() -> None:
    clock = SimulatedClock()
    rate = Rate(1, clock, entries_max=10, ttl_s=60)
    for number in range(100):
        rate.allow(str(number))
    assert len(rate) == 10
    clock.advance(100)
    for _ in range(20):
        rate.allow("one")
        clock.advance(1.5)
    assert len(rate) == 1


def test_ten_excesses_in_ten_seconds_ban_for_a_while() -> None:
    clock = SimulatedClock()
    bans = Bans(300, clock)
    for _ in range(9):
        bans.excess("a")
    clock.advance(11)
    bans.excess("a")
    assert bans.left_s("a") == 0
    for _ in range(9):
        bans.excess("a")
    assert bans.left_s("a") == pytest.approx(300)
    assert bans.left_s("b") == 0
    clock.advance(301)
    assert bans.left_s("a") == 0


def test_addresses_of_one_ipv6_customer_are_one_caller() -> None:
    assert caller_key("2001:db8::1") == caller_key("2001:db8::ffff:2") == "2001:db8::/64"
    assert caller_key("::ffff:1.2.3.4") == caller_key("1.2.3.4") == "1.2.3.4"


def test_limits_hold_for_other_machines_and_not_for_this_one() -> None:
    clock = SimulatedClock()
    settings = {"rate_limit_max_requests_per_ip_per_sec": 5, "rate_limit_max_auth_requests_per_ip_per_sec": 2}
    guards = Guards(Settings.load(settings, environment={}), clock)
    local, remote = guards.peers.of("127.0.0.1", LOCAL_HOST), guards.peers.of("9.9.9.9", {})
    assert all(guards.wait_s(local, is_auth=True) == 0 for _ in range(50))
    assert [guards.wait_s(remote, is_auth=True) == 0 for _ in range(3)] == [True, True, False]
    assert [guards.wait_s(remote, is_auth=False) == 0 for _ in range(3)] == [True, True, False]
    for _ in range(8):
        guards.wait_s(remote, is_auth=False)
    assert guards.wait_s(remote, is_auth=False) == pytest.approx(300)
    assert guards.banned_s("9.9.9.9") == pytest.approx(300)
    clock.advance(301)
    assert guards.wait_s(remote, is_auth=False) == 0


def test_limits_by_address_can_be_switched_off() -> None:
    guards = Guards(Settings.load({"rate_limit_enable_connection_protection": False}, environment={}), SimulatedClock())
    remote = guards.peers.of("9.9.9.9", {})
    assert all(guards.wait_s(remote, is_auth=True) == 0 for _ in range(1000))
    assert guards.is_exempt("9.9.9.9")
