"""`python -m bench [--quick]`: measure and print. Ends with 1 when a goal is missed."""

from __future__ import annotations

import sys
from itertools import chain

from bench import http
from bench.harness import console, machine, show
from bench.live import live
from bench.queue import claims, queue
from bench.rows import inserts
from bench.scans import compare
from bench.sharing import sharing


def main(quick: bool) -> int:
    console.rule(f"KalamDB on {machine()}")
    scale = 1 if quick else 10
    goals = show(
        f"100,000 hot and {scale},000,000 cold rows, append-only; peer: DataFusion on the same Parquet files and "
        "an in-memory batch; median of 15, interleaved",
        chain(compare("SHARED", scale * 1_000_000, 100_000), compare("USER", scale * 1_000_000, 100_000)),
    )
    hot = 50_000 if quick else 200_000
    show(
        "Rows; a ratio over 1 means that we are faster",
        chain(
            inserts("commit", hot=hot, large=200_000 * scale, single=1_000 * scale),
            inserts("os", hot=hot, large=200_000 * scale, single=1_000 * scale),
        ),
    )
    load = {"count": 5_000 if quick else 100_000, "single": 500 * scale, "picked_up": 100 * scale}
    goals &= show(
        "Jobs that do nothing, with events and jobs.log; a ratio of rates over 1 means that we are faster",
        chain(
            queue("commit", slots=10, **load), queue("os", slots=10, **load),
            queue("commit", slots=100, **load), queue("os", slots=100, **load),
        ),
    )  # fmt: skip
    goals &= show("Jobs beside those that have ended", claims(5_000 if quick else 1_000_000))
    rounds = 500 if quick else 5_000
    goals &= show(
        "Calls of an attached process; peer: the same call in the process that holds the directory",
        chain(sharing("os", rounds=rounds), sharing("commit", rounds=rounds)),
    )
    goals &= http.main(quick)
    show(
        "Live queries; peer: the same insert without a subscription",
        chain(live("commit", inserts=200 * scale, changes=200), live("os", inserts=1_000 * scale, changes=200)),
    )
    return 0 if goals else 1


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
