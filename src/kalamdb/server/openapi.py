"""The OpenAPI document of the server, at /openapi.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kalamdb.server.bodies import SqlBody
from kalamdb.version import VERSION

_TEXT: dict[str, Any] = {"type": "string"}
_NUMBER: dict[str, Any] = {"type": "number"}


def _object(required: Sequence[str], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


_ERROR = _object(["code", "message"], code=_TEXT, message=_TEXT, details=_TEXT)
_FIELD = _object(
    ["name", "data_type", "index"],
    name=_TEXT,
    data_type={"oneOf": [{"type": "string"}, {"type": "object"}]},
    index={"type": "integer"},
    flags={"type": "array", "items": {"type": "string", "enum": ["nn", "pk", "uq"]}},
)
_RESULT = _object(
    ["row_count", "as_user"],
    schema={"type": "array", "items": _ref("Field")},
    rows={"type": "array", "items": {"type": "array", "items": {}}},
    row_count={"type": "integer", "minimum": 0},
    message={"type": ["string", "null"]},
    as_user=_TEXT,
)
_ANSWER = _object(
    ["status", "results", "took"],
    status={"type": "string", "enum": ["success", "error"]},
    results={"type": "array", "items": _ref("Result")},
    took=_NUMBER,
    error={"oneOf": [_ref("Error"), {"type": "null"}]},
)
_SCHEMAS: dict[str, Any] = {
    "Error": _ERROR,
    "Field": _FIELD,
    "Result": _RESULT,
    "SqlAnswer": _ANSWER,
    "Message": {"type": "object"},
    "Credentials": _object(["password"], user=_TEXT, username=_TEXT, password=_TEXT),
    "Setup": _object(
        ["password", "root_password"], user=_TEXT, username=_TEXT, password=_TEXT, root_password=_TEXT, email=_TEXT
    ),
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, for the document. `statuses` are the answers but 200; with `token` a Bearer token is needed."""

    method: str
    path: str
    summary: str
    answer: str = "Message"
    body: str | None = None
    token: bool = False
    statuses: tuple[int, ...] = ()


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "post", "/v1/api/sql", "Run SQL", "SqlAnswer", "SqlBody", True, (400, 401, 403, 409, 413, 429, 500, 503)
    ),
    Operation("post", "/v1/api/auth/login", "Log in", body="Credentials", statuses=(400, 401, 403, 415, 428, 429)),
    Operation("post", "/v1/api/auth/refresh", "Take new tokens", statuses=(400, 401, 403, 415, 429)),
    Operation("post", "/v1/api/auth/logout", "Forget the cookies", statuses=(403, 429)),
    Operation("get", "/v1/api/auth/me", "Who the caller is", token=True, statuses=(401, 429)),
    Operation("get", "/v1/api/auth/status", "Whether the server must be set up", statuses=(429,)),
    Operation("post", "/v1/api/auth/setup", "Set up: root's password and an administrator", body="Setup",
              statuses=(400, 403, 409, 415, 429)),
    Operation("get", "/health", "Whether the server lives", statuses=(403,)),
    Operation("get", "/v1/api/healthcheck", "Whether the server lives", statuses=(403,)),
    Operation("get", "/v1/api/cluster/health", "The node", statuses=(403,)),
    Operation("get", "/ready", "Whether requests may come", statuses=(403, 503)),
    Operation("get", "/openapi.json", "This document"),
)  # fmt: skip


def document(operations: Iterable[Operation] = OPERATIONS) -> dict[str, Any]:
    """The document, of those operations."""
    _, components = msgspec.json.schema_components([SqlBody], ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for one in operations:
        paths.setdefault(one.path, {})[one.method] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {"title": "KalamDB", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": {**_SCHEMAS, **components},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _operation(one: Operation) -> dict[str, Any]:
    def answer(schema: str, description: str) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}

    found: dict[str, Any] = {
        "summary": one.summary,
        "responses": {
            "200": answer(one.answer, "success"),
            **{str(status): answer(one.answer, "refused") for status in one.statuses},
        },
    }
    if one.token:
        found["security"] = [{"bearer": []}]
    if one.body is not None:
        content = {"application/json": {"schema": _ref(one.body)}}
        found["requestBody"] = {"required": True, "content": content}
    return found


async def _get(request: Request) -> Response:
    return Response(msgspec.json.encode(document()), media_type="application/json")


def openapi_routes() -> Sequence[Route]:
    """What to mount."""
    return [Route("/openapi.json", _get, methods=["GET"])]
