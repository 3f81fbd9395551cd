"""A caching proxy with the seniority model's own gRPC interface."""
