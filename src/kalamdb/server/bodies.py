"""The body of POST /v1/api/sql: JSON, or a form; checked against the limits before anything is parsed."""

from __future__ import annotations

from email import message_from_bytes
from typing import Any

import msgspec

from kalamdb.errors import KalamDbError

_NAMESPACE_LENGTH_MAX = 64


class BadBody(KalamDbError):
    """The request is not understood. `code` says in which way, as the original names it."""

    http_status = 400

    def __init__(self, message: str, code: str = "INVALID_INPUT", status: int = 400) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]
        self.http_status = status  # type: ignore[misc]


class SqlBody(msgspec.Struct):
    """A request to run SQL."""

    sql: str
    params: list[Any] | None = None
    namespace_id: str | None = None


class BodyLimits(msgspec.Struct, frozen=True):
    """Bounds of a request."""

    parameters_max: int
    parameter_bytes_max: int


_decoder = msgspec.json.Decoder(SqlBody)


def read_body(raw: bytes, content_type: str, limits: BodyLimits) -> SqlBody:
    """The request in a body. Raises BadBody."""
    if content_type.startswith("multipart/form-data"):
        body = _from_form(raw, content_type)
    else:
        body = _from_json(raw)
    if body.params:
        _check_params(body.params, limits)
    if body.namespace_id is not None and not _is_name(body.namespace_id):
        raise BadBody(f"namespace_id {body.namespace_id[:80]!r} is not a name of letters, digits and underscores")
    return body


def _from_json(raw: bytes) -> SqlBody:
    try:
        return _decoder.decode(raw)
    except msgspec.ValidationError as exc:
        raise BadBody(f"the body is not a request to run SQL: {exc}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadBody(f"the body is not JSON: {exc}") from None


def _from_form(raw: bytes, content_type: str) -> SqlBody:
    try:
        head = b"Content-Type: " + content_type.encode("latin-1") + b"\r\n\r\n"
        form = message_from_bytes(head + raw)
        parts = form.get_payload() if form.is_multipart() else None
    except (ValueError, LookupError, RecursionError):
        parts = None
    if not isinstance(parts, list):
        raise BadBody("the body is not a multipart form")
    found: dict[str, str] = {}
    for part in parts:
        if isinstance(part, str):
            continue
        name = part.get_param("name", header="content-disposition")
        if isinstance(name, str) and name.startswith("file:"):
            raise BadBody(f"part '{name[:80]}' holds a file: this server does not store files yet")
        if name not in ("sql", "params", "namespace_id"):
            raise BadBody(f"part {name!r} is not one of sql, params, namespace_id")
        payload = part.get_payload(decode=True)
        try:
            found[name] = payload.decode() if isinstance(payload, bytes) else ""
        except UnicodeDecodeError:
            raise BadBody(f"part '{name}' is not UTF-8") from None
    if "sql" not in found:
        raise BadBody("the form has no part 'sql'")
    params: list[Any] | None = None
    if "params" in found:
        try:
            params = msgspec.json.decode(found["params"], type=list[Any])
        except (msgspec.DecodeError, RecursionError) as exc:
            raise BadBody(f"part 'params' is not a JSON array: {exc}") from None
    return SqlBody(found["sql"], params, found.get("namespace_id"))


def _check_params(params: list[Any], limits: BodyLimits) -> None:
    if len(params) > limits.parameters_max:
        raise BadBody(
            f"{len(params)} parameters were given, at most {limits.parameters_max} are allowed "
            "(execution.max_parameters)",
            "INVALID_PARAMETER",
        )
    for number, value in enumerate(params, 1):
        if isinstance(value, (list, dict)):
            what = "Array" if isinstance(value, list) else "Object"
            raise BadBody(f"Parameter ${number} invalid: {what} parameters not yet supported", "INVALID_PARAMETER")
        size = len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else 8
        if size > limits.parameter_bytes_max:
            raise BadBody(
                f"Parameter ${number} invalid: it takes {size} bytes, at most {limits.parameter_bytes_max} are allowed "
                "(execution.max_parameter_size_bytes)",
                "INVALID_PARAMETER",
            )


def _is_name(name: str) -> bool:
    return name.isidentifier() and len(name) <= _NAMESPACE_LENGTH_MAX
