"""Prometheus metrics of the process."""
