"""Figures, each beside its floor in the same run. `python -m benchmarks.NAME` runs one, `make bench` all."""
