"""An ordered store on disk: RocksDB through rocksdict, in raw mode with one column family.

What rocksdict does not do by itself is here: iteration that reports damage, handles that end with the
database, errors of our tree that name the file.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rocksdict import AccessType, BlockBasedOptions, Cache, DBRecoveryMode, Options, Rdict, RdictIter, ReadOptions, WriteBatch, WriteOptions  # fmt: skip
from rocksdict import Snapshot as RocksSnapshot

from kalamdb.errors import Closed, Corrupt, KalamDbError, Unavailable
from kalamdb.storage import Caps
from kalamdb.storage.ordered import Range, Write

_FILE_NAME = re.compile(r"[^\s'\"]*?(\d{6}\.(?:sst|log)|MANIFEST-\d+|CURRENT|OPTIONS-\d+|IDENTITY)")
_DAMAGE = ("corruption", "checksum mismatch", "bad magic", "truncated", "not an sstable", "no such file", "does not exist")


def translate(exc: Exception, path: Path) -> KalamDbError:
    """An error of rocksdict as one of our tree; damage names the file."""
    text = str(exc)
    if "dbclosed" in type(exc).__name__.lower():
        return Closed("the database is closed; open it again")
    named = _FILE_NAME.search(text)
    where = path / named.group(1) if named else path
    if any(word in text.lower() for word in _DAMAGE):
        return Corrupt(f"'{where}' is damaged: {text}; restore the directory from a backup")
    return Unavailable(f"the store in '{path}' refuses: {text}; mend the disk (space, rights), then open it again")


class _Reading:
    """Reads through an iterator source, with damage reported."""

    def __init__(self, kv: RocksKv, source: Rdict | RocksSnapshot) -> None:
        self._kv = kv
        self._source: Rdict | RocksSnapshot | None = source

    def _iterator(self, end: bytes) -> RdictIter:
        source = self._source
        if source is None:
            raise Closed("the database is closed; open it again")
        options = ReadOptions()
        options.set_verify_checksums(True)
        options.set_iterate_upper_bound(end)
        return source.iter(options)

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        try:
            iterator = self._iterator(end)
            if reverse:
                iterator.seek_for_prev(end)
                if iterator.valid() and iterator.key() >= end:
                    iterator.prev()
            else:
                iterator.seek(start)
            step = iterator.prev if reverse else iterator.next
            while iterator.valid():
                key = iterator.key()
                if key < start:
                    break
                yield key, iterator.value()
                if self._source is None:
                    raise Closed("the database was closed during a scan; open it again")
                step()
            iterator.status()
        except KalamDbError:
            raise
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self._kv.path) from exc

    def get(self, key: bytes) -> bytes | None:
        found = next(iter(self.scan(key, key + b"\x00")), None)
        return None if found is None else found[1]

    def get_many(self, wanted: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in wanted]

    def close(self) -> None:
        """Release the snapshot."""
        self._source = None


class RocksKv:
    """`OrderedKv` over RocksDB in `path`, which is made only with `create`."""

    caps = Caps(inline=True, multi_node=False, batch_rows_max=4096, snapshot_age_max_s=300.0)

    def __init__(
        self, path: Path, *, create: bool, block_cache_bytes: int = 32 << 20, write_buffer_bytes: int = 64 << 20, open_files_max: int = 512
    ) -> None:
        self.path = path
        options = Options(raw_mode=True)
        options.create_if_missing(create)
        options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
        options.set_write_buffer_size(write_buffer_bytes)
        options.set_max_open_files(open_files_max)
        options.set_paranoid_checks(True)
        options.set_keep_log_file_num(2)
        table = BlockBasedOptions()
        table.set_block_cache(Cache(block_cache_bytes))
        table.set_bloom_filter(10.0, False)
        options.set_block_based_table_factory(table)
        try:
            self._db = Rdict(str(path), options=options, access_type=AccessType.read_write())
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, path) from exc
        self._write_options = WriteOptions()
        self._write_options.sync = False
        self._latest = _Reading(self, self._db)
        self._snapshots: weakref.WeakSet[_Reading] = weakref.WeakSet()
        self._closing = threading.Lock()
        self._closed = False

    def get(self, key: bytes) -> bytes | None:
        try:
            found: bytes | None = self._db.get(key)
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc
        return found

    def get_many(self, wanted: Sequence[bytes]) -> list[bytes | None]:
        if not wanted:
            return []
        try:
            found: list[bytes | None] = self._db.get(list(wanted))
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc
        return found

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        return self._latest.scan(start, end, reverse=reverse)

    def write(self, writes: Sequence[Write], ranges: Sequence[Range] = ()) -> None:
        try:
            batch = WriteBatch(raw_mode=True)
            for start, end in ranges:
                batch.delete_range(start, end)
            for key, value in writes:
                if value is None:
                    batch.delete(key)
                else:
                    batch.put(key, value)
            self._db.write(batch, self._write_options)
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc

    def snapshot(self) -> _Reading:
        try:
            reading = _Reading(self, self._db.snapshot())
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc
        self._snapshots.add(reading)
        return reading

    def sync(self) -> None:
        try:
            self._db.flush_wal(True)
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc

    def stats(self) -> Mapping[str, int]:
        names = {
            "rocksdb.estimate-num-keys": "keys_estimate",
            "rocksdb.cur-size-all-mem-tables": "memtable_bytes",
            "rocksdb.total-sst-files-size": "sst_bytes",
        }
        return {short: int(self._db.property_int_value(name) or 0) for name, short in names.items()}

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for reading in list(self._snapshots):
            reading.close()
        self._latest.close()
        try:
            self._db.close()
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc
