"""Benchmarks. Each result stands beside a baseline of the same run.

`python -m benchmarks.NAME` runs one, `make bench` all of them.
"""
