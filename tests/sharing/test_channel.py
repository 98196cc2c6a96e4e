"""The socket and what comes through it: rights, long paths, greetings, what is not a frame, who is not let in."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kalamdb
from kalamdb.sharing import SharedDatabase, listener
from kalamdb.sharing.channel import FRAME_BYTES_MAX, Channel, Kind, Lost, dial
from kalamdb.sharing.values import Hello, encode, error_of, portable, request_bytes, request_of
from tests.sharing.conftest import QUIET


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[SharedDatabase]:
    """A database that this process holds and shares."""
    with kalamdb.connect(tmp_path / "data", share=True, **QUIET) as db:
        assert isinstance(db, SharedDatabase)
        yield db


def raw(path: Path) -> socket.socket:
    """A connection that has said nothing yet."""
    opened = socket.socket(socket.AF_UNIX)
    opened.settimeout(20)
    opened.connect(str(path / "data" / "kalamdb.sock"))
    return opened


def greeted(path: Path, *, protocol: int = listener.PROTOCOL) -> Channel:
    """A connection that has said who it is."""
    channel = Channel(raw(path))
    channel.send(Kind.HELLO, encode(Hello(protocol, "9.9", 1)))
    return channel


def refused(error: tuple[Kind, memoryview]) -> Exception:
    """What an answer raises."""
    assert error[0] is Kind.ERROR
    return error_of(error[1], lambda row: None)  # type: ignore[arg-type,return-value]


def test_the_socket_is_only_for_its_user_and_goes_with_the_database(tmp_path: Path) -> None:
    path = tmp_path / "data" / "kalamdb.sock"
    former = os.umask(0)
    try:
        with kalamdb.connect(tmp_path / "data", share=True, **QUIET):
            assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(former)
    assert not path.exists()
    path.write_text("left behind")
    with kalamdb.connect(tmp_path / "data", share=True, **QUIET), kalamdb.connect(tmp_path / "data") as other:
        assert other.execute("SELECT 1").scalar() == 1


def test_a_path_that_is_too_long_for_a_socket_works(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / ("ö" * 60) / "data"
    with kalamdb.connect(path, share=True, **QUIET), kalamdb.connect(path) as other:
        assert other.execute("SELECT 1").scalar() == 1
        assert (path / "kalamdb.sock").exists()


def test_a_database_in_memory_is_not_shared() -> None:
    with pytest.raises(kalamdb.InvalidRequest, match="in memory cannot be shared"):
        kalamdb.connect(":memory:", share=True)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">IB", 3, 2) + b"\xc1\xc1\xc1",
        struct.pack(">IB", FRAME_BYTES_MAX + 1, 2),
        struct.pack(">IB", 2, 99) + b"{}",
        struct.pack(">IB", 0, 4),
        struct.pack(">IB", 100, 2) + b"short",
        struct.pack(">IB", 9, 2) + b"\x93\xa1x\x90\xc7\x01\x03z\x80",
    ],
)
@pytest.mark.parametrize("is_greeted", [False, True])
def test_what_is_no_frame_ends_that_connection_only(
    shared: SharedDatabase, tmp_path: Path, sent: bytes, is_greeted: bool
) -> None:
    with kalamdb.connect(tmp_path / "data") as other:
        other.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY)")
        with raw(tmp_path) as bad:
            if is_greeted:
                Channel(bad).send(Kind.HELLO, encode(Hello(listener.PROTOCOL, "", 1)))
                assert bad.recv(1000)
            bad.sendall(sent)
            bad.shutdown(socket.SHUT_WR)
            assert bad.recv(1) == b""
        assert other.execute("SELECT count(*) FROM t").scalar() == 0
        assert shared.execute("SELECT count(*) FROM t").scalar() == 0


def test_another_protocol_is_refused_with_both_versions(shared: SharedDatabase, tmp_path: Path) -> None:
    channel = greeted(tmp_path, protocol=99)
    error = refused(channel.receive())
    assert isinstance(error, kalamdb.Unavailable)
    assert f"KalamDB {kalamdb.__version__} (protocol 1), this one has 9.9 (protocol 99)" in str(error)
    with pytest.raises(Lost):
        channel.receive()
    channel.close()


def test_an_unknown_call_and_wrong_arguments_are_answered(shared: SharedDatabase, tmp_path: Path) -> None:
    channel = greeted(tmp_path)
    assert msgspec.msgpack.decode(channel.receive()[1])["database_uid"] == shared.context.directory.database_uid  # type: ignore[union-attr]
    for name, args, kind in (
        ("__class__", [], kalamdb.InvalidRequest),
        ("execute", [], TypeError),
        ("execute_inside", ["SELECT 1", None, None, None], kalamdb.Conflict),
        ("leave", [], kalamdb.Conflict),
    ):
        channel.send(Kind.REQUEST, request_bytes(name, args, {}))
        assert isinstance(refused(channel.receive()), kind)
    channel.send(Kind.REQUEST, request_bytes("check", [], {}))
    assert channel.receive()[0] is Kind.VALUE
    channel.close()


def test_more_connections_than_are_served_are_refused(
    shared: SharedDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 2)
    kept = [greeted(tmp_path), greeted(tmp_path)]
    for one in kept:
        assert one.receive()[0] is Kind.HELLO
    third = greeted(tmp_path)
    assert isinstance(refused(third.receive()), kalamdb.LimitExceeded)
    for one in [*kept, third]:
        one.close()


def test_another_user_is_not_let_in_on_either_side(
    shared: SharedDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system tells who is at the other end; as whom we run is what the test changes.
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    channel = greeted(tmp_path)
    error = refused(channel.receive())
    assert isinstance(error, kalamdb.Denied)
    assert str(error) == f"the data directory is held by user {me + 1}; user {me} may not attach to it"
    channel.close()
    with pytest.raises(kalamdb.Denied, match=f"belongs to user {me}; only the same user may attach"):
        kalamdb.connect(tmp_path / "data")


def test_a_database_that_was_made_anew_is_another_one(tmp_path: Path) -> None:
    first = kalamdb.connect(tmp_path / "data", share=True, **QUIET)
    with kalamdb.connect(tmp_path / "data") as other:
        assert other.execute("SELECT 1").scalar() == 1
        first.close()
        (tmp_path / "data").rename(tmp_path / "old")
        with kalamdb.connect(tmp_path / "data", share=True, **QUIET):
            with pytest.raises(kalamdb.Closed, match="holds another database now"):
                other.execute("SELECT 1")


def test_a_slow_reader_of_a_stream_stops_the_sender(shared: SharedDatabase, tmp_path: Path) -> None:
    with kalamdb.connect(tmp_path / "data") as other:
        big = "SELECT repeat('x', 1000) AS v FROM generate_series(1, 1000000)"
        with other.stream(big) as batches:
            next(batches)
            # A gigabyte is to come; meanwhile other calls of the same process go on.
            assert other.execute("SELECT 2").scalar() == 2
        assert shared.connections <= 3


def test_calls_from_many_threads_each_have_a_connection(shared: SharedDatabase, tmp_path: Path) -> None:
    shared.execute("CREATE SHARED TABLE t (id INT PRIMARY KEY)")
    failed: list[BaseException] = []
    with kalamdb.connect(tmp_path / "data") as other:

        def work(number: int) -> None:
            try:
                for at in range(20):
                    other.execute("INSERT INTO t VALUES ($1)", [number * 100 + at])
            except BaseException as exc:
                failed.append(exc)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert other.execute("SELECT count(*) FROM t").scalar() == 240
    assert shared.execute("SELECT count(*) FROM t").scalar() == 240


@pytest.mark.parametrize("value", [2**63, -(2**200), [1, [2**64]], {"a": {"b": 2**70}}])
def test_integers_of_any_size_come_through(value: Any) -> None:
    request = request_of(memoryview(request_bytes("x", [value], {"n": value})))
    assert request.args == [value] and request.named == {"n": value}


def test_what_cannot_be_sent_is_named() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for bad in (object(), {1, 2}, deep, lambda: None):
        with pytest.raises(kalamdb.InvalidRequest):
            request_bytes("x", [bad], {})
    assert portable((1, True, None, "x", b"y", 1.5)) == [1, True, None, "x", b"y", 1.5]


def test_nobody_listens_without_a_holder(tmp_path: Path) -> None:
    assert dial(tmp_path, 1.0) is None
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "kalamdb.sock"))
    left.close()
    assert dial(tmp_path, 1.0) is None
