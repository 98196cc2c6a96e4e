"""SQL functions that the engine lacks: JSON access over text. Invalid JSON and missing paths give NULL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pyarrow as pa
from datafusion import SessionContext, udf

_MISSING = object()


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


def register_functions(context: SessionContext) -> None:
    """Make the JSON functions known to a context."""
    text, number = pa.string(), pa.int64()
    access = {
        "json_get": (_json_text, text),
        "json_get_json": (_json_text, text),
        "json_as_text": (_plain_text, text),
        "json_get_str": (_typed(str), text),
        "json_get_int": (_typed(int), number),
        "json_get_float": (_typed(float), pa.float64()),
        "json_get_bool": (_typed(bool), pa.bool_()),
    }
    for name, (convert, kind) in access.items():
        context.register_udf(udf(_access(convert, kind), [text, text], kind, "immutable", name))
    context.register_udf(udf(_contains, [text, text], pa.bool_(), "immutable", "json_contains"))
    context.register_udf(udf(_whole(_length, number), [text], number, "immutable", "json_length"))
    keys = pa.list_(pa.field("item", text))
    context.register_udf(udf(_whole(_keys, keys), [text], keys, "immutable", "json_object_keys"))


FUNCTION_NAMES = frozenset(
    "json_get json_get_json json_as_text json_get_str json_get_int json_get_float json_get_bool json_contains "
    "json_length json_object_keys".split()
)
