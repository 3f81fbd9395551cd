"""The gRPC server: addresses, limits, the servicer, statuses, health and reflection."""
