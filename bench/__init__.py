"""Benchmarks: `make bench` and `make bench-quick`."""
