"""The Redis client that the cache and the queue share: one server, Sentinel or a Cluster."""
