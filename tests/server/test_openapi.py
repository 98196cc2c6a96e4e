"""The OpenAPI document: served, complete, and its references resolve."""

from __future__ import annotations

import re

from kalamdb.server.openapi import document
from tests.server.conftest import Served


def test_the_document_is_served_and_its_references_resolve(served: Served) -> None:
    answer = served.client.get("/openapi.json")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    found = answer.json()
    assert found == document()
    for name in re.findall(r'"#/components/schemas/(\w+)"', answer.text):
        assert name in found["components"]["schemas"], name


def test_each_route_of_the_document_answers(served: Served) -> None:
    for path, operations in document()["paths"].items():
        for method in operations:
            status = served.client.request(method.upper(), path).status_code
            assert status != 404 and status < 500, (method, path, status)
            assert str(status) in operations[method]["responses"], (method, path, status)
