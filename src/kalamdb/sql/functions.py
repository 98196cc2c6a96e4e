"""SQL functions that the engine lacks: JSON access over text, and fresh ids.

Invalid JSON and missing paths give NULL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pyarrow as pa
from datafusion import SessionContext, udf

_MISSING = object()

JSON_ACCESS_NAMES = frozenset(
    "json_get json_get_json json_as_text json_get_str json_get_int json_get_float json_get_bool json_contains".split()
)
"""Functions of a document and a path."""
JSON_WHOLE_NAMES = frozenset({"json_length", "json_object_keys"})
"""Functions of a document, or of what a path leads to."""
GENERATED_NAMES = ("snowflake_id", "uuid_v7", "ulid")

Generators = Mapping[str, Callable[[], object]]
"""What makes a fresh value, by the names of GENERATED_NAMES."""

_GENERATED_FIELDS = {
    "snowflake_id": pa.field("id", pa.int64()),
    "uuid_v7": pa.field("id", pa.string(), metadata={b"kalam": b"UUID"}),
    "ulid": pa.field("id", pa.string()),
}


def _parsed(text: str | None) -> Any:
    if text is None:
        return _MISSING
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return _MISSING


def _member(document: Any, key: str | None) -> Any:
    if isinstance(document, dict) and key in document:
        return document[key]
    if isinstance(document, list) and key is not None and key.lstrip("-").isdigit():
        index = int(key)
        if -len(document) <= index < len(document):
            return document[index]
    return _MISSING


def _json_text(value: Any) -> str | None:
    return None if value is _MISSING else msgspec.json.encode(value).decode()


def _plain_text(value: Any) -> str | None:
    if value is _MISSING or value is None:
        return None
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _typed(kind: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return None
        return value if type(value) is kind else None

    return convert


def _access(convert: Callable[[Any], Any], kind: pa.DataType) -> Callable[[pa.Array, pa.Array], pa.Array]:
    def evaluate(documents: pa.Array, keys: pa.Array) -> pa.Array:
        pairs = zip(documents.to_pylist(), keys.to_pylist(), strict=True)
        return pa.array([convert(_member(_parsed(text), key)) for text, key in pairs], kind)

    return evaluate


def _whole(convert: Callable[[Any], Any], kind: pa.DataType) -> Callable[[pa.Array], pa.Array]:
    def evaluate(documents: pa.Array) -> pa.Array:
        return pa.array([convert(_parsed(text)) for text in documents.to_pylist()], kind)

    return evaluate


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, dict)) else None


def _keys(value: Any) -> list[str] | None:
    return list(value) if isinstance(value, dict) else None


def _has(value: Any) -> bool:
    return value is not _MISSING


def _contains(documents: pa.Array, keys: pa.Array) -> pa.Array:
    pairs = zip(documents.to_pylist(), keys.to_pylist(), strict=True)
    return pa.array(
        [None if text is None or key is None else _has(_holds(_parsed(text), key)) for text, key in pairs], pa.bool_()
    )


def _holds(document: Any, key: str) -> Any:
    if isinstance(document, list):
        return key if key in document else _member(document, key)
    return _member(document, key)


def register_functions(context: SessionContext, generators: Generators) -> None:
    """Make the JSON functions, and those of `generators`, known to a context."""
    text, number = pa.string(), pa.int64()
    document = pa.field("json", text, metadata={b"kalam": b"JSON"})
    access: dict[str, tuple[Callable[[Any], Any], pa.DataType, pa.DataType | pa.Field]] = {
        "json_get": (_json_text, text, document),
        "json_get_json": (_json_text, text, document),
        "json_as_text": (_plain_text, text, text),
        "json_get_str": (_typed(str), text, text),
        "json_get_int": (_typed(int), number, number),
        "json_get_float": (_typed(float), pa.float64(), pa.float64()),
        "json_get_bool": (_typed(bool), pa.bool_(), pa.bool_()),
    }
    for name, (convert, kind, returned) in access.items():
        context.register_udf(udf(_access(convert, kind), [text, text], returned, "immutable", name))
    context.register_udf(udf(_contains, [text, text], pa.bool_(), "immutable", "json_contains"))
    context.register_udf(udf(_whole(_length, number), [text], number, "immutable", "json_length"))
    keys = pa.list_(pa.field("item", text))
    context.register_udf(udf(_whole(_keys, keys), [text], keys, "immutable", "json_object_keys"))
    for name, make in generators.items():
        field = _GENERATED_FIELDS[name]
        context.register_udf(udf(_fresh(make, field.type), [pa.float64()], field, "volatile", name))


def _fresh(make: Callable[[], object], kind: pa.DataType) -> Callable[[pa.Array], pa.Array]:
    def evaluate(rows: pa.Array) -> pa.Array:
        return pa.array([make() for _ in range(len(rows))], kind)

    return evaluate
