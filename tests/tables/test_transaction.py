"""Transactions beside changes of the schema."""

from __future__ import annotations

from tests.conftest import Open


def test_a_table_that_a_transaction_left_as_it_was_may_be_altered_meanwhile(open_db: Open) -> None:
    db = open_db()
    db.execute("CREATE SHARED TABLE written (id INT PRIMARY KEY)")
    db.execute("CREATE SHARED TABLE touched (id INT PRIMARY KEY)")
    with db.transaction() as tx:
        tx.execute("INSERT INTO written VALUES (1)")
        assert tx.execute("DELETE FROM touched WHERE id = 6").row_count == 0
        db.execute("ALTER TABLE touched ADD COLUMN v INT")
    assert db.execute("SELECT id FROM written").rows == [(1,)]
