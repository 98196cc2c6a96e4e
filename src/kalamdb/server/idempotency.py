"""Idempotency-Key: a write that a client sends again is answered as the first time, and not run again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import LimitExceeded
from kalamdb.server.answers import Answer
from kalamdb.server.bodies import BadBody, SqlBody
from kalamdb.storage import ANY, Batch, RecordKind, RecordOp, StorageBackend, record_key, record_prefix

_ANSWER_BYTES_MAX = 1 << 20
_KEY_LENGTH_MAX = 255
_PURGED_MAX = 8
"""Old records that each new one removes: more than it adds, so they never pile up."""


class Remembered(msgspec.Struct, frozen=True, array_like=True):
    """The first request with a key. `status` is 0 while its outcome is not known."""

    digest: bytes
    at_ms: int
    status: int
    head: bytes = b""
    tail: bytes = b""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Remembered)


class Idempotency:
    """Remembers requests by user and key for some hours, over restarts. Thread-safe."""

    def __init__(self, backend: StorageBackend, clock: Clock, hours: float) -> None:
        self._backend = backend
        self._clock = clock
        self._kept_ms = int(hours * 3_600_000)
        self._lock = threading.Lock()
        self._running: set[tuple[str, str]] = set()

    @contextmanager
    def one(self, user: str, key: str, body: SqlBody) -> Iterator[Attempt]:
        """The attempt to run a request. Raises BadBody (409) while another one of the user has the key."""
        if not 0 < len(key) <= _KEY_LENGTH_MAX or not key.isprintable():
            raise BadBody(f"Idempotency-Key must have 1 to {_KEY_LENGTH_MAX} printable characters")
        holder = (user, key)
        with self._lock:
            if holder in self._running:
                raise BadBody(
                    f"a request with Idempotency-Key '{key}' is running; ask again when it has ended",
                    "IDEMPOTENCY_CONFLICT",
                    409,
                )
            self._running.add(holder)
        try:
            yield Attempt(self, record_key(RecordKind.IDEMPOTENT, user, key), key, body)
        finally:
            with self._lock:
                self._running.discard(holder)

    def find(self, record: bytes) -> Remembered | None:
        """What is remembered under a record's key."""
        [stored] = self._backend.latest().records([record])
        found = None if stored is None else _decoder.decode(stored.value)
        return None if found is None or found.at_ms < self._clock.now_ms() - self._kept_ms else found

    def operations(self, record: bytes, digest: bytes, answer: Answer | None) -> list[RecordOp]:
        """What a commit adds to remember an answer, or that a request begins."""
        now_ms = self._clock.now_ms()
        status, head, tail = (0, b"", b"") if answer is None else (answer.status, answer.head, answer.tail)
        if len(head) > _ANSWER_BYTES_MAX:
            raise LimitExceeded(
                f"the answer takes {len(head)} bytes; with an Idempotency-Key at most {_ANSWER_BYTES_MAX} are allowed"
            )
        value = _encoder.encode(Remembered(digest, now_ms, status, head, tail))
        aged = record_key(RecordKind.IDEMPOTENT_AGE, now_ms) + record
        return [RecordOp(record, value, ANY), RecordOp(aged, b"", ANY), *self._purge(now_ms)]

    def _purge(self, now_ms: int) -> list[RecordOp]:
        start, _ = record_prefix(RecordKind.IDEMPOTENT_AGE)
        end = record_key(RecordKind.IDEMPOTENT_AGE, max(now_ms - self._kept_ms, 0))
        out = []
        reader = self._backend.latest()
        for aged, _ in reader.scan_records(start, end, limit=_PURGED_MAX):
            out.append(RecordOp(aged, None, ANY))
            record = aged[len(end) :]
            [stored] = reader.records([record])
            if stored is not None and _decoder.decode(stored.value).at_ms < now_ms - self._kept_ms:
                out.append(RecordOp(record, None, stored.version))
        return out

    def keep(self, operations: Sequence[RecordOp]) -> None:
        """Commit them, durable on return."""
        self._backend.wait_durable(self._backend.commit(Batch(records=list(operations))))


class Attempt:
    """One request with a key."""

    def __init__(self, owner: Idempotency, record: bytes, key: str, body: SqlBody) -> None:
        self._owner = owner
        self._record = record
        self._key = key
        self._digest = hashlib.sha256(msgspec.json.encode([body.sql, body.params, body.namespace_id])).digest()

    def earlier(self) -> Answer | None:
        """The answer to the first request. Raises BadBody (409) for another body, or when its end is not known."""
        found = self._owner.find(self._record)
        if found is None:
            return None
        if found.digest != self._digest:
            raise BadBody(
                f"Idempotency-Key '{self._key}' was used with another body; take a fresh key for a fresh request",
                "IDEMPOTENCY_CONFLICT",
                409,
            )
        if not found.status:
            raise BadBody(
                f"the server stopped while it ran the first request with Idempotency-Key '{self._key}': whether it "
                "took effect is not known; look at the data and take a fresh key",
                "IDEMPOTENCY_CONFLICT",
                409,
            )
        return Answer(found.status, found.head, found.tail, replayed=True)

    def operations(self, answer: Answer) -> list[RecordOp]:
        """What remembers an answer, for the commit of the writes themselves."""
        return self._owner.operations(self._record, self._digest, answer)

    def begin(self) -> None:
        """Remember that it begins, before writes that cannot carry the answer."""
        self._owner.keep(self._owner.operations(self._record, self._digest, None))

    def end(self, answer: Answer) -> None:
        """Remember the answer, by itself."""
        self._owner.keep(self.operations(answer))

    def forget(self) -> None:
        """It did not happen: the key may be used again."""
        self._owner.keep([RecordOp(self._record, None, ANY)])


__all__ = ["Attempt", "Idempotency"]
