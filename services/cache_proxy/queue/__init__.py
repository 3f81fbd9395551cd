"""The queue of pairs that are not cached: shared in Redis, or local to the process."""
