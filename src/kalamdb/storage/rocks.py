"""An ordered store on disk: RocksDB through rocksdict, in raw mode with one column family.

What rocksdict does not do by itself is here: iteration that reports damage, handles that end with the
database, errors of our tree that name the file.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    BottommostLevelCompaction,
    Cache,
    Checkpoint,
    CompactOptions,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    RdictIter,
    WriteBatch,
    WriteOptions,
)

from kalamdb.errors import Closed, Corrupt, KalamDbError, Unavailable
from kalamdb.storage import Caps
from kalamdb.storage.log_check import check_log, first_damaged
from kalamdb.storage.ordered import Range, Write
from kalamdb.storage.seal import break_seal, check_seal, seal

_log = logging.getLogger("kalamdb.storage")
_FIRST_CHUNK_ROWS = 16
_CHUNK_ROWS = 1024
_TABLE_FILE_BYTES = 8 << 20
"""Small files: a purge holds up the process for one of them at a time."""
_FILE_NAME = re.compile(r"[^\s'\"]*?(\d{6}\.(?:sst|log)|MANIFEST-\d+|CURRENT|OPTIONS-\d+|IDENTITY)")
_NAMED = re.compile(r"\d{6}\.sst|MANIFEST|CURRENT|No such file")
_HINT = "  The file "
_EXAMINED_ENTRIES_MAX = 500_000
"""Entries that are read before a store is opened for writing: half a second at most."""
_DAMAGE = (
    "corruption",
    "checksum mismatch",
    "bad magic",
    "truncated",
    "not an sstable",
    "no such file",
    "does not exist",
)


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


def _options(open_files_max: int) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(False)
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_max_open_files(open_files_max)
    options.set_paranoid_checks(True)
    return options


def _examine(path: Path, open_files_max: int) -> None:
    """Refuse a damaged store before anything in it is touched: RocksDB turns its own log over even when it refuses.

    Raises Corrupt naming the file.
    """
    check_seal(path)
    logs = sorted(path.glob("*.log"))
    if not logs and path.is_dir():
        raise Corrupt(f"the write-ahead log '{path}/*.log' is missing; restore the directory from a backup")
    manifests = list(path.glob("MANIFEST-*"))
    for log in [*logs, *manifests]:
        damaged_at = check_log(log).damaged_at
        if damaged_at is not None:
            raise Corrupt(f"'{log}' is damaged at byte {damaged_at}; restore the directory from a backup")
    try:
        _read(Rdict(str(path), options=_options(open_files_max), access_type=AccessType.read_only()))
    except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
        refused = translate(exc, path)
        if isinstance(refused, Corrupt) and not _NAMED.search(str(exc).partition(_HINT)[0]):
            refused = _located(path, [*logs, *manifests], exc)
        raise refused from exc


def _read(store: Rdict) -> None:
    """Read what an opening reads, and in a small store everything."""
    try:
        iterator = store.iter()
        iterator.seek_to_first()
        for _ in range(_EXAMINED_ENTRIES_MAX):
            if not iterator.valid():
                break
            iterator.next()
        iterator.status()
        del iterator
    finally:
        store.close()


def _located(path: Path, logs: Sequence[Path], exc: Exception) -> Corrupt:
    """RocksDB does not say which of its logs it means, and hints at MANIFEST when it means a table file."""
    for log in logs:
        if (damaged_at := first_damaged(log)) is not None:
            return Corrupt(f"'{log}' is damaged at byte {damaged_at}: {exc}; restore the directory from a backup")
    text = str(exc).partition(_HINT)[0]
    return Corrupt(f"one of the table files '{path}/*.sst' is damaged: {text}; restore the directory from a backup")


class _Reading:
    """A consistent view: one iterator, which sees the store as it was when it was made.

    rocksdict's Snapshot is not used: its iterators read the newest state. The iterator is shared by all
    scans of the view, so each takes its entries in chunks and seeks again.
    """

    def __init__(self, path: Path, database: Rdict) -> None:
        self._path = path
        self._iterator: RdictIter | None = database.iter()
        self._lock = threading.Lock()

    def scan(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        left = sys.maxsize if limit is None else limit
        rows = _FIRST_CHUNK_ROWS
        while left > 0:
            rows = min(rows, left)
            chunk = self._chunk(start, end, rows, reverse)
            yield from chunk
            left -= len(chunk)
            if len(chunk) < rows:
                return
            if reverse:
                end = chunk[-1][0]
            else:
                start = chunk[-1][0] + b"\x00"
            rows = _CHUNK_ROWS

    def _chunk(self, start: bytes, end: bytes, rows: int, reverse: bool) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        with self._lock:
            iterator = self._iterator
            if iterator is None:
                raise Closed("the database is closed; open it again")
            try:
                if reverse:
                    iterator.seek_for_prev(end)
                    if iterator.valid() and iterator.key() >= end:
                        iterator.prev()
                else:
                    iterator.seek(start)
                step = iterator.prev if reverse else iterator.next
                valid, key_of, value_of = iterator.valid, iterator.key, iterator.value
                while valid():
                    key = key_of()
                    if not start <= key < end:
                        break
                    found.append((key, value_of()))
                    if len(found) == rows:
                        break
                    step()
                iterator.status()
            except Exception as exc:
                raise translate(exc, self._path) from exc
        return found

    def get(self, key: bytes) -> bytes | None:
        found = self._chunk(key, key + b"\x00", 1, False)
        return found[0][1] if found else None

    def get_many(self, wanted: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in wanted]

    def close(self) -> None:
        """Release the view."""
        with self._lock:
            self._iterator = None


class RocksKv:
    """`OrderedKv` over RocksDB in `path`, which is made only with `create`."""

    caps = Caps(inline=True, multi_node=False, batch_rows_max=4096, snapshot_age_max_s=300.0)

    def __init__(
        self,
        path: Path,
        *,
        create: bool,
        block_cache_bytes: int = 32 << 20,
        write_buffer_bytes: int = 64 << 20,
        open_files_max: int = 512,
        background_jobs_max: int = 2,
        compressed: bool = True,
    ) -> None:
        self.path = path
        options = _options(open_files_max)
        options.set_max_background_jobs(background_jobs_max)
        options.create_if_missing(create)
        options.set_write_buffer_size(write_buffer_bytes)
        options.set_keep_log_file_num(2)
        options.set_target_file_size_base(_TABLE_FILE_BYTES)
        if not compressed:
            options.set_compression_type(DBCompressionType.none())
        table = BlockBasedOptions()
        table.set_block_cache(Cache(block_cache_bytes))
        table.set_bloom_filter(10.0, False)
        options.set_block_based_table_factory(table)
        try:
            if not create:
                _examine(path, open_files_max)
                break_seal(path)
            # Without families named here rocksdict takes the options that the store was made with.
            families = None if create else {"default": options}
            self._db = Rdict(str(path), options=options, column_families=families, access_type=AccessType.read_write())
        except KalamDbError:
            raise
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, path) from exc
        self._is_sound = True
        self._write_options = WriteOptions()
        self._write_options.sync = False
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

    def scan(
        self, start: bytes, end: bytes, *, reverse: bool = False, limit: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        return self.snapshot().scan(start, end, reverse=reverse, limit=limit)

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
            self._is_sound = False
            raise translate(exc, self.path) from exc

    def snapshot(self) -> _Reading:
        try:
            reading = _Reading(self.path, self._db)
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc
        self._snapshots.add(reading)
        return reading

    def sync(self) -> None:
        try:
            self._db.flush_wal(True)
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            self._is_sound = False
            raise translate(exc, self.path) from exc

    def purge(self, ranges: Sequence[Range]) -> None:
        # What is in memory goes to a file first, which ends the log that holds it; then each file that
        # touches a range is rewritten down to the last level. rocksdict holds the GIL meanwhile, a file
        # at a time is what `target_file_size_base` makes short.
        options = CompactOptions()
        options.set_bottommost_level_compaction(BottommostLevelCompaction.force())
        try:
            self._db.flush(True)
            for start, end in ranges:
                self._db.compact_range(start, end, compact_opt=options)
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            raise translate(exc, self.path) from exc

    def checkpoint(self, path: Path) -> None:
        # What is in memory goes to a file first, so the copy has an empty log; table files are linked.
        try:
            Checkpoint(self._db).create_checkpoint(str(path))
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
        try:
            self._db.close()
        except Exception as exc:  # noqa: BLE001 - rocksdict raises bare Exception
            # It could not move the log into a table file. What was acknowledged is in the log.
            _log.warning("%s", translate(exc, self.path))
            return
        if self._is_sound:
            seal(self.path)
