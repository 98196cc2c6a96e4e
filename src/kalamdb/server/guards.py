"""Who asks, as far as the network can say, and how often they may: addresses, loopback privileges, rates, bans.

All of it is called on the loop only.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kalamdb.clock import Clock
from kalamdb.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_FORWARDING = frozenset({b"forwarded", b"x-real-ip", b"via", b"true-client-ip", b"cf-connecting-ip"})
_FORWARDING_PREFIX = b"x-forwarded-"
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_CACHED_MAX = 4096
_EXCESSES_TO_BAN = 10
_EXCESS_WINDOW_S = 10.0
_IPV6_CUSTOMER_BITS = 64
"""One customer of a provider has at least this network, so addresses in it are one caller."""


def address_of(text: str) -> Address | None:
    """The address that a text names, an IPv4 one as such also when it is written as IPv6; None for anything else."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def networks(key: str, texts: Iterable[str]) -> tuple[Network, ...]:
    """Addresses and networks of a setting. Raises InvalidRequest that names the setting `key`."""
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text.strip(), strict=False))
        except ValueError:
            raise InvalidRequest(f"{key}: '{text}' is not an address or network, as 10.0.0.0/8") from None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a request."""

    ip: str
    """The address of the client: of the connection, or what a trusted proxy says."""
    is_local: bool
    """Whether it comes from this machine for certain: set-up, health and no rate limits hang on it."""
    is_certain: bool
    """False when a proxy that is not trusted forwarded it, so that `ip` is the proxy's."""


@dataclass(frozen=True, slots=True)
class _Origin:
    """What is known of the address of a connection."""

    address: Address | None
    is_loopback: bool
    is_trusted: bool


class Peers:
    """Finds out who sent a request, from its connection and its headers."""

    def __init__(self, *, trusted: Iterable[Network] = (), health: Iterable[Network] = (), hosts: Iterable[str] = ()):
        self._trusted = tuple(trusted)
        self._health = tuple(health)
        self._hosts = frozenset(name.lower() for name in (*_LOCAL_NAMES, *hosts))
        self._origin = lru_cache(_CACHED_MAX)(self._find_origin)
        self._direct = lru_cache(_CACHED_MAX)(self._find_direct)

    def is_exempt(self, ip: str) -> bool:
        """Whether connections from there have no limit of their own: this machine, and trusted proxies."""
        origin = self._origin(ip)
        return origin.is_loopback or origin.is_trusted

    def of(self, ip: str, headers: Mapping[bytes, bytes]) -> Peer:
        """The sender of a request that came from `ip`. `headers` by lower-case name."""
        if _FORWARDING.isdisjoint(headers) and _FORWARDING_PREFIX not in b"\n".join(headers):
            return self._direct(ip, headers.get(b"host", b""))
        origin = self._origin(ip)
        if not origin.is_trusted:
            return Peer(ip, False, False)
        client = self._forwarded_for(headers.get(b"x-forwarded-for", b"").decode("latin-1"))
        return Peer(ip, False, False) if client is None else Peer(str(client), False, True)

    def may_ask_health(self, peer: Peer) -> bool:
        """Whether health and metrics are shown: from this machine, or from a network of server.health_networks."""
        if peer.is_local:
            return True
        origin = self._origin(peer.ip)
        if not peer.is_certain or origin.is_loopback or origin.address is None:
            return False
        return _within(origin.address, self._health)

    def _forwarded_for(self, header: str) -> Address | None:
        """The last address that a trusted proxy did not give itself; None when it is not to be told."""
        found: Address | None = None
        for entry in reversed(header.split(",")):
            found = address_of(_without_port(entry.strip()))
            if found is None or not _within(found, self._trusted):
                return found
        return found

    def _find_origin(self, ip: str) -> _Origin:
        address = address_of(ip)
        if address is None:
            return _Origin(None, False, False)
        return _Origin(address, address.is_loopback, _within(address, self._trusted))

    def _find_direct(self, ip: str, host: bytes) -> Peer:
        return Peer(ip, self._origin(ip).is_loopback and self._has_our_name(host), True)

    def _has_our_name(self, host: bytes) -> bool:
        name = _without_port(host.decode("latin-1").strip().lower())
        return name.removesuffix(".") in self._hosts


def _within(address: Address, wanted: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in wanted)


def _without_port(text: str) -> str:
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


class Rate:
    """At most `per_s` calls per second and key, as many at once after a pause.

    Kept is one number per key: when its bucket is full again. A key that was silent for `ttl_s` is forgotten, and
    the longest silent one when there are more than `entries_max`.
    """

    def __init__(self, per_s: float, clock: Clock, *, entries_max: int = 1000, ttl_s: float = 600.0) -> None:
        self._step_s = 1.0 / per_s
        self._burst_s = max(1.0, self._step_s)
        self._clock = clock
        self._entries_max = entries_max
        self._ttl_s = ttl_s
        self._full_at_s: OrderedDict[str, float] = OrderedDict()

    def allow(self, key: str) -> bool:
        """Count a call of `key`; False when it is too many, and then it does not count."""
        return self.wait_s(key) == 0.0

    def wait_s(self, key: str) -> float:
        """The same; 0 when the call is allowed, else the seconds after which one is."""
        now_s = self._clock.monotonic_s()
        table = self._full_at_s
        full_at_s = table.get(key, now_s)
        if full_at_s < now_s:
            full_at_s = now_s
        over_s = full_at_s + self._step_s - now_s - self._burst_s
        if over_s > 1e-9:
            table.move_to_end(key)
            return over_s
        table[key] = full_at_s + self._step_s
        table.move_to_end(key)
        if len(table) > self._entries_max:
            table.popitem(last=False)
        else:
            oldest = next(iter(table))
            if table[oldest] + self._ttl_s < now_s:
                del table[oldest]
        return 0.0

    def __len__(self) -> int:
        return len(self._full_at_s)


class Bans:
    """Addresses that are refused for a while because they went on after ten excesses."""

    def __init__(self, ban_s: float, clock: Clock, *, entries_max: int = 1000) -> None:
        self._ban_s = ban_s
        self._clock = clock
        self._entries_max = entries_max
        self._excesses: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._until_s: OrderedDict[str, float] = OrderedDict()

    def excess(self, key: str) -> None:
        """Count an excess; the tenth within ten seconds bans."""
        now_s = self._clock.monotonic_s()
        began_s, count = self._excesses.get(key, (now_s, 0))
        if now_s - began_s > _EXCESS_WINDOW_S:
            began_s, count = now_s, 0
        if count + 1 < _EXCESSES_TO_BAN:
            self._excesses[key] = (began_s, count + 1)
            self._excesses.move_to_end(key)
        else:
            self._excesses.pop(key, None)
            self._until_s[key] = now_s + self._ban_s
            self._until_s.move_to_end(key)
        for table in (self._excesses, self._until_s):
            if len(table) > self._entries_max:
                table.popitem(last=False)

    def left_s(self, key: str) -> float:
        """Seconds for which `key` is still banned, 0 for none."""
        if not self._until_s:
            return 0.0
        until_s = self._until_s.get(key)
        if until_s is None:
            return 0.0
        left_s = until_s - self._clock.monotonic_s()
        if left_s <= 0:
            del self._until_s[key]
            return 0.0
        return left_s


def caller_key(ip: str) -> str:
    """What limits count by: the address, of IPv6 its network."""
    if ":" not in ip:
        return ip
    address = address_of(ip)
    if not isinstance(address, ipaddress.IPv6Address):
        return ip if address is None else str(address)
    return str(ipaddress.IPv6Network((int(address), _IPV6_CUSTOMER_BITS), strict=False))


class Guards:
    """The limits of a server, as its settings say."""

    def __init__(self, settings: Mapping[str, Any], clock: Clock) -> None:
        entries = {
            "entries_max": settings["rate_limit.cache_max_entries"], "ttl_s": settings["rate_limit.cache_ttl_seconds"]
        }  # fmt: skip
        self.peers = Peers(
            trusted=networks("security.trusted_proxy_ranges", settings["security.trusted_proxy_ranges"]),
            health=networks("server.health_networks", settings["server.health_networks"]),
            hosts=settings["server.allowed_hosts"],
        )
        self.protects = settings["rate_limit.enable_connection_protection"]
        """Whether addresses have limits."""
        self.auth = Rate(settings["rate_limit.max_auth_requests_per_ip_per_sec"], clock, **entries)
        """Requests for log-in, by address."""
        self.requests = Rate(settings["rate_limit.max_requests_per_ip_per_sec"], clock, **entries)
        """All requests, by address."""
        self.bans = Bans(
            settings["rate_limit.ban_duration_seconds"], clock, entries_max=settings["rate_limit.cache_max_entries"]
        )

    def is_exempt(self, ip: str) -> bool:
        """Whether connections from there have no limit of their own."""
        return not self.protects or self.peers.is_exempt(ip)

    def banned_s(self, ip: str) -> float:
        """Seconds for which connections from there are still refused."""
        return self.bans.left_s(caller_key(ip))

    def wait_s(self, peer: Peer, *, is_auth: bool) -> float:
        """Count a request; 0 when it is allowed, else the seconds to wait. Those from this machine always are."""
        if peer.is_local or not self.protects:
            return 0.0
        key = caller_key(peer.ip)
        left_s = self.bans.left_s(key)
        if left_s:
            return left_s
        wait_s = self.requests.wait_s(key)
        if not wait_s and is_auth:
            wait_s = self.auth.wait_s(key)
        if wait_s and not self.peers.is_exempt(peer.ip):
            self.bans.excess(key)
        return wait_s
