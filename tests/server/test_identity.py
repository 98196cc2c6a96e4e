"""What is remembered of tokens and log-ins inside the server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

import kalamdb
from kalamdb.database import Database
from kalamdb.errors import Unauthenticated
from kalamdb.server.identity import Authenticator
from kalamdb.server.logins import AuthFailure, Logins
from kalamdb.server.tokens import TokenKind, Tokens
from tests.server.conftest import JWT_SECRET


@pytest.fixture
def db() -> Iterator[Database]:
    with kalamdb.connect(":memory:", **{"auth.bcrypt_cost": 4}) as database:
        database.execute("CREATE USER anna WITH PASSWORD 'Secret-of-1'")
        yield database


@pytest.fixture
def tokens(db: Database) -> Tokens:
    return Tokens(JWT_SECRET, db.context.clock, access_s=3600)


@pytest.fixture
def authenticator(db: Database, tokens: Tokens) -> Iterator[Authenticator]:
    made = Authenticator(db.context.users, tokens, db.context.clock)
    yield made
    made.close()


def issue(db: Database, tokens: Tokens) -> str:
    """A new access token of anna."""
    anna = db.context.users.find("anna")
    assert anna is not None
    return tokens.issue(anna, TokenKind.ACCESS).text


def test_a_token_is_verified_once_while_its_user_stays_as_it_is(
    db: Database, tokens: Tokens, authenticator: Authenticator
) -> None:
    token = issue(db, tokens)
    first = authenticator.verify(token)
    assert authenticator.verify(token) is first
    db.execute("CREATE USER bert")
    assert authenticator.verify(token) is first
    db.execute("ALTER USER anna SET EMAIL 'a@example.org'")
    assert authenticator.verify(token) == first and authenticator.verify(token) is not first


@pytest.mark.parametrize(
    "change", ["ALTER USER anna SET ROLE dba", "ALTER USER anna SET PASSWORD 'Secret-of-2'", "DROP USER anna"]
)
def test_a_remembered_token_ends_with_the_commit_that_changes_its_user(
    db: Database, tokens: Tokens, authenticator: Authenticator, change: str
) -> None:
    token = issue(db, tokens)
    authenticator.verify(token)
    db.execute(change)
    with pytest.raises(Unauthenticated):
        authenticator.verify(token)


def test_a_new_user_of_an_old_name_does_not_inherit_tokens(
    db: Database, tokens: Tokens, authenticator: Authenticator
) -> None:
    token = issue(db, tokens)
    authenticator.verify(token)
    db.jobs.wait((db.execute("PURGE USER anna").message or "").rsplit(" ", 1)[1], timeout_s=30)
    db.execute("CREATE USER anna WITH PASSWORD 'Secret-of-1'")
    with pytest.raises(Unauthenticated):
        authenticator.verify(token)
    assert authenticator.verify(issue(db, tokens)).user == "anna"


def test_observers_hear_of_each_user_that_changes(db: Database) -> None:
    heard: list[str] = []
    db.context.users.observe(heard.append)
    db.execute("CREATE USER bert")
    db.execute("ALTER USER anna SET ROLE service")
    db.execute("DROP USER bert")
    assert heard == ["bert", "anna", "bert"]


def test_more_than_32_waiting_logins_are_refused(db: Database) -> None:
    logins = Logins(db.context.users, db.context.clock)
    gate = threading.Event()

    async def crowd() -> list[object]:
        waiting = [asyncio.create_task(logins.run(gate.wait)) for _ in range(33)]
        await asyncio.sleep(0)
        with pytest.raises(AuthFailure) as caught:
            await logins.check("anna", "Secret-of-1", address="127.0.0.1", is_local=True)
        assert (caught.value.status, caught.value.slug) == (429, "rate_limited")
        gate.set()
        return list(await asyncio.gather(*waiting))

    try:
        assert asyncio.run(crowd()) == [True] * 33
        user = asyncio.run(logins.check("anna", "Secret-of-1", address="127.0.0.1", is_local=True))
        assert user.user_id == "anna"
    finally:
        gate.set()
        logins.close()
