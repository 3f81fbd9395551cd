"""The client of the proxy: batches, retries, and the wire format."""
