"""The gRPC server: listeners, limits, the servicer, statuses."""
