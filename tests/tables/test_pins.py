"""A file that something reads is not deleted under it."""

from __future__ import annotations

from kalamdb.storage import keys
from kalamdb.types import SHARED_SCOPE, TableId
from tests.conftest import Open, run_job


def test_a_version_that_was_looked_up_can_be_loaded_after_its_segment_was_compacted_away(open_db: Open) -> None:
    db = open_db()
    db.execute("CREATE NAMESPACE app")
    db.execute("CREATE SHARED TABLE app.t (id BIGINT PRIMARY KEY, v TEXT)")
    for number in range(2):
        db.execute("INSERT INTO app.t VALUES ($1, 'cold')", [number])
        run_job(db, "STORAGE FLUSH TABLE app.t")
    store, entry = db.context.store, db.context.catalog.require(TableId("app", "t"))
    before = {segment.path for segment in store.state(entry.definition.uid).segments}
    with store.newest(entry, [keys.row_key(SHARED_SCOPE, keys.encode_int(1))]) as ([version], _):
        run_job(db, "STORAGE COMPACT TABLE app.t")
        assert version is not None
        assert store.load(version, entry) == (1, "cold")
        assert all(path.exists() for path in before)
    assert not any(path.exists() for path in before)
    assert db.execute("SELECT count(*) FROM app.t").scalar() == 2
