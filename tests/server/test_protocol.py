"""Bounds of connections: what the server does with those who send too much, too slowly, or too often."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import connect as connect_socket
from websockets.exceptions import ConnectionClosed

from kalamdb.errors import InvalidRequest
from kalamdb.server.listener import Listener
from kalamdb.server.protocol import Wire

from .listening import WAIT_S, Raw, connection, count_bytes, listening, run

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def refused(raw: Raw, status: int, code: str) -> None:
    """The answer is a JSON error, and the connection ends."""
    found, headers, body = await raw.answer()
    assert (found, headers["connection"], headers["content-type"]) == (status, "close", "application/json")
    assert f'"code":"{code}"'.encode() in body
    assert await raw.rest() == b""


def test_a_header_of_three_megabytes_is_answered_431_and_not_kept() -> None:
    async def scenario() -> None:
        async with listening() as (listener, door):
            raw = await connection(listener)
            await raw.send(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (3 << 20) + b"\r\n\r\n")
            await refused(raw, 431, "HEADER_TOO_LARGE")
            assert door.refused == 1

    run(scenario())


@pytest.mark.parametrize("kind", ["name", "value", "path", "many"])
def test_a_header_above_its_limit_is_refused_whatever_is_long(kind: str) -> None:
    long = b"a" * 3000
    header = {
        "name": b"GET / HTTP/1.1\r\n" + long + b": 1\r\n\r\n",
        "value": b"GET / HTTP/1.1\r\nx: " + long + b"\r\n\r\n",
        "path": b"GET /" + long + b" HTTP/1.1\r\n\r\n",
        "many": b"GET / HTTP/1.1\r\n" + b"a: 1\r\n" * 600 + b"\r\n",
    }[kind]

    async def scenario() -> None:
        async with listening(performance_max_header_size=2048) as (listener, _):
            whole = await connection(listener)
            await whole.send(header)
            await refused(whole, 431, "HEADER_TOO_LARGE")
            fits = await connection(listener)
            await fits.send(GET)
            assert (await fits.answer())[0] == 200

    run(scenario())


def test_the_bytes_of_a_body_do_not_count_as_header() -> None:
    async def scenario() -> None:
        async with listening(performance_max_header_size=1024) as (listener, _):
            raw = await connection(listener)
            for _ in range(3):
                await raw.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n" + b"b" * 50_000)
                assert (await raw.answer())[2] == b"50000"

    run(scenario())


def test_a_header_that_is_sent_in_half_ends_after_its_time() -> None:
    async def scenario() -> None:
        async with listening(performance_client_request_timeout=0.2) as (listener, door):
            raw = await connection(listener)
            await raw.send(b"GET / HTTP/1.1\r\nHost: x\r\n")
            await refused(raw, 408, "HEADER_TIMEOUT")
            assert door.refused == 1

    run(scenario())


def test_a_second_header_on_a_connection_has_the_same_time() -> None:
    async def scenario() -> None:
        async with listening(performance_client_request_timeout=0.2) as (listener, _):
            raw = await connection(listener)
            await raw.send(GET)
            assert (await raw.answer())[0] == 200
            await raw.send(b"GET / HT")
            await refused(raw, 408, "HEADER_TIMEOUT")

    run(scenario())


def test_a_connection_that_sends_nothing_is_closed_without_an_answer() -> None:
    async def scenario() -> None:
        async with listening(performance_client_request_timeout=0.2) as (listener, _):
            raw = await connection(listener)
            assert await raw.rest() == b""

    run(scenario())


def test_an_idle_connection_is_kept_and_then_closed() -> None:
    async def scenario() -> None:
        async with listening(performance_client_request_timeout=0.1, performance_keepalive_timeout=0.5) as (
            listener,
            _,
        ):
            raw = await connection(listener)
            began_s = asyncio.get_running_loop().time()
            await raw.send(GET)
            assert (await raw.answer())[0] == 200
            assert await raw.rest() == b""
            assert asyncio.get_running_loop().time() - began_s > 0.4

    run(scenario())


@pytest.mark.parametrize("length", [b"Content-Length: 2000", b"Transfer-Encoding: chunked"])
def test_a_body_above_its_limit_is_refused_while_it_is_received(length: bytes) -> None:
    async def scenario() -> None:
        async with listening(security_max_request_body_size=1024) as (listener, _):
            raw = await connection(listener)
            await raw.send(b"POST / HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n")
            if length.startswith(b"T"):
                await raw.send(b"400\r\n" + b"a" * 1024 + b"\r\n")
                await raw.send(b"1\r\na\r\n")
            await refused(raw, 413, "BODY_TOO_LARGE")

    run(scenario())


def test_a_refused_body_may_be_sent_on_and_its_answer_is_still_read() -> None:
    async def scenario() -> None:
        async with listening(security_max_request_body_size=1024) as (listener, _):
            raw = await connection(listener)
            await raw.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b"a" * 9_000_000)
            await refused(raw, 413, "BODY_TOO_LARGE")

    run(scenario())


def test_a_body_that_does_not_arrive_ends_after_its_time() -> None:
    async def scenario() -> None:
        async with listening(performance_request_timeout=0.2) as (listener, door):
            raw = await connection(listener)
            await raw.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            await refused(raw, 408, "BODY_TIMEOUT")
            assert door.refused == 1

    run(scenario())


def test_an_answer_that_nobody_reads_ends_after_its_time() -> None:
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> None:
        async with listening(endless, performance_request_timeout=0.3) as (listener, door):
            raw = await connection(listener)
            await raw.send(GET)
            await raw.answer()
            await asyncio.wait_for(door.without_http(), WAIT_S)
            await raw.close()

    run(scenario())


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_400(request_: bytes) -> None:
    async def scenario() -> None:
        async with listening() as (listener, _):
            raw = await connection(listener)
            await raw.send(request_)
            await refused(raw, 400, "INVALID_HTTP")

    run(scenario())


def test_an_offer_of_http2_is_answered_in_http1() -> None:
    async def scenario() -> None:
        async with listening() as (listener, _):
            raw = await connection(listener)
            upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
            await raw.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")
            assert (await raw.answer())[0] == 200
            assert await raw.rest() == b""
            with_body = await connection(listener)
            await with_body.send(b"POST / HTTP/1.1\r\nHost: x\r\n" + upgrade + b"Content-Length: 2\r\n\r\nab")
            await refused(with_body, 400, "INVALID_HTTP")

    run(scenario())


def test_more_connections_of_one_address_than_allowed_are_refused_until_others_end() -> None:
    async def scenario() -> None:
        async with listening(rate_limit_max_connections_per_ip=2) as (listener, door):
            first, second = await connection(listener), await connection(listener)
            for raw in (first, second):
                await raw.send(GET)
                assert (await raw.answer())[0] == 200
            third = await connection(listener)
            await refused(third, 429, "TOO_MANY_CONNECTIONS")
            await third.close()
            await first.close()
            while door.open > 1:
                await asyncio.sleep(0.01)
            fourth = await connection(listener)
            await fourth.send(GET)
            assert (await fourth.answer())[0] == 200

    run(scenario())


def test_addresses_without_a_limit_still_meet_that_of_all_connections() -> None:
    async def scenario() -> None:
        limits = {"rate_limit_max_connections_per_ip": 1, "performance_max_connections": 3}
        async with listening(is_exempt=lambda ip: True, **limits) as (listener, _):
            for _ in range(3):
                raw = await connection(listener)
                await raw.send(GET)
                assert (await raw.answer())[0] == 200
            await refused(await connection(listener), 503, "TOO_MANY_CONNECTIONS")

    run(scenario())


def test_no_header_names_the_server() -> None:
    async def scenario() -> None:
        async with listening() as (listener, _):
            raw = await connection(listener)
            await raw.send(GET)
            headers = (await raw.answer())[1]
            assert "server" not in headers
            assert headers["x-content-type-options"] == "nosniff"

    run(scenario())


def test_a_stop_lets_a_running_request_finish_and_closes_idle_connections() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await release.wait()
        await count_bytes(scope, receive, send)

    async def scenario() -> None:
        async with listening(slow, performance_client_request_timeout=WAIT_S) as (listener, _):
            idle, busy = await connection(listener), await connection(listener)
            await busy.send(GET)
            await entered.wait()
            listener.stop_accepting()
            ended = asyncio.ensure_future(listener.finish_requests(asyncio.Event(), WAIT_S))
            assert await idle.rest() == b""
            with pytest.raises(OSError):
                await connection(listener)
            assert not ended.done()
            release.set()
            assert (await busy.answer())[0] == 200
            await asyncio.wait_for(ended, WAIT_S)

    run(scenario())


@pytest.mark.parametrize("by_signal", [True, False])
def test_requests_that_do_not_finish_are_cancelled_at_their_time_or_at_a_second_signal(by_signal: bool) -> None:
    entered, cancelled, hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            await count_bytes(scope, receive, send)

    async def scenario() -> None:
        async with listening(endless) as (listener, _):
            raw = await connection(listener)
            await raw.send(GET)
            await entered.wait()
            listener.stop_accepting()
            if by_signal:
                hurry.set()
            await asyncio.wait_for(listener.finish_requests(hurry, 100.0 if by_signal else 0.1), WAIT_S)
            assert cancelled.is_set()
            assert (await raw.answer())[0] == 200

    run(scenario())


# WebSockets


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends each message back; `many` is answered by three frames in one write, `age` by the time since a frame."""
    wire: Wire = scope["state"]["wire"]
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        if text == "many":
            wire.send_all(["a", b"b", "c"])
        elif text == "abort":
            wire.abort()
        elif text == "age":
            await send({"type": "websocket.send", "text": str(asyncio.get_running_loop().time() - wire.frame_at_s)})
        else:
            await send({**message, "type": "websocket.send"})


def socket_url(listener: Listener) -> str:
    """The address of a WebSocket."""
    return listener.url.replace("http", "ws") + "/v1/ws"


def test_frames_of_one_write_arrive_as_messages_and_no_compression_is_agreed() -> None:
    async def scenario() -> None:
        async with listening(echo) as (listener, door), connect_socket(socket_url(listener)) as client:
            assert client.response is not None and "sec-websocket-extensions" not in client.response.headers
            await client.send("many")
            assert [await client.recv() for _ in range(3)] == ["a", b"b", "c"]
            assert len(door.sockets) == 1 and not door.http

    run(scenario())


def test_ping_and_pong_count_as_life() -> None:
    async def scenario() -> None:
        async with listening(echo) as (listener, door), connect_socket(socket_url(listener)) as client:
            await client.send("hello")
            await client.recv()
            (protocol,) = door.sockets
            wire = protocol.wire
            for send in (client.ping, client.pong):
                wire.frame_at_s = 0.0
                await send()
                while not wire.frame_at_s:
                    await asyncio.sleep(0)
            await client.send("age")
            assert float(await client.recv()) < 1.0

    run(scenario())


def test_a_message_above_its_limit_closes_the_socket_with_1009() -> None:
    async def scenario() -> None:
        async with listening(echo, security_max_ws_message_size=2048) as (listener, _):
            async with connect_socket(socket_url(listener)) as client:
                await client.send("a" * 3000)
                with pytest.raises(ConnectionClosed):
                    await client.recv()
                assert client.close_code == 1009

    run(scenario())


def test_sockets_count_as_connections_of_their_address_and_are_counted_off() -> None:
    async def scenario() -> None:
        async with listening(echo, rate_limit_max_connections_per_ip=1) as (listener, door):
            async with connect_socket(socket_url(listener)):
                second = await connection(listener)
                await refused(second, 429, "TOO_MANY_CONNECTIONS")
                await second.close()
            while door.open:
                await asyncio.sleep(0.01)
            async with connect_socket(socket_url(listener)) as client:
                await client.send("abort")
                with pytest.raises(ConnectionClosed):
                    await client.recv()
            while door.open:
                await asyncio.sleep(0.01)

    run(scenario())


def test_a_handshake_with_a_line_that_is_too_long_is_refused_and_forgotten() -> None:
    async def scenario() -> None:
        async with listening(echo) as (listener, door):
            raw = await connection(listener)
            upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            await raw.send(b"GET /v1/ws HTTP/1.1\r\nHost: x\r\n" + upgrade + key + b"X: " + b"a" * 9000 + b"\r\n\r\n")
            assert (await raw.answer())[0] == 400
            assert await raw.rest() == b""
            while door.open:
                await asyncio.sleep(0.01)

    run(scenario())


def test_open_sockets_are_closed_with_1012_at_the_end() -> None:
    async def scenario() -> None:
        async with listening(echo) as (listener, _):
            async with connect_socket(socket_url(listener)) as client:
                await client.send("x")
                await client.recv()
                listener.stop_accepting()
                listener.close()
                with pytest.raises(ConnectionClosed):
                    await client.recv()
                assert client.close_code == 1012

    run(scenario())


# TLS


def test_a_certificate_makes_the_server_speak_tls_and_half_a_handshake_ends(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    files = {"server_tls_cert_file": str(cert), "server_tls_key_file": str(key)}

    async def scenario() -> None:
        async with listening(**files, performance_client_request_timeout=0.3) as (listener, _):
            assert listener.url.startswith("https://")
            trusted = ssl.create_default_context(cafile=str(cert))
            async with httpx.AsyncClient(verify=trusted, trust_env=False) as client:
                answer = await client.post(listener.url, content=b"abc")
                assert (answer.status_code, answer.text) == (200, "3")
            raw = await connection(listener)
            await raw.send(b"\x16\x03\x01")
            assert await raw.rest() == b""

    run(scenario())


def test_a_certificate_without_its_key_is_refused() -> None:
    async def scenario() -> None:
        async with listening(server_tls_cert_file="cert.pem"):
            pass

    with pytest.raises(InvalidRequest, match="server.tls_key_file"):
        run(scenario())
