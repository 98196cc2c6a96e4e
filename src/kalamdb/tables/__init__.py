"""Tables over a hot and a cold tier: layout, reads, writes, flush, compaction, cleanup."""
