"""The table of roles over HTTP: the same statements as over the API of a program, 200 or 403."""

from __future__ import annotations

import pytest

from kalamdb.types import Role
from tests.role_matrix import MATRIX, WORLD, check
from tests.server.conftest import Served

PARTS = 8
PASSWORD = "Secret-of-1"


@pytest.fixture(scope="module")
def world(shared: Served) -> Served:
    """The objects of the matrix, and ann with her tokens of each role."""
    for statement in WORLD:
        assert shared.sql(statement).status_code == 200, statement
    shared.add_user("ann", password=PASSWORD)
    return shared


@pytest.mark.parametrize("part", range(PARTS))
def test_each_statement_is_for_certain_roles(world: Served, part: int) -> None:
    found: dict[str, set[Role]] = {}
    statements = MATRIX[part::PARTS]
    for role in Role:
        assert world.sql(f"ALTER USER ann SET ROLE {role}").status_code == 200
        world.tokens.pop("ann", None)
        world.login("ann", PASSWORD)
        for statement, _ in statements:
            answer = world.sql(statement, user="ann")
            if answer.status_code != 403:
                assert answer.status_code == 200, (role, statement, answer.text)
                found.setdefault(statement, set()).add(role)
            else:
                assert answer.json()["error"]["code"] == "PERMISSION_DENIED"
    for statement, roles in statements:
        check(lambda sql, role: role in found.get(sql, ()), statement, roles)
