"""What `deploy/grafana/*.json` is made of."""
