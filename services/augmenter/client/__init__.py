"""The client of the proxy: batches, deduplicates, retries and encodes requests for levels."""
