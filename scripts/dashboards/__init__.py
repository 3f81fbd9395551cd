"""The sources of `deploy/grafana/*.json`."""
