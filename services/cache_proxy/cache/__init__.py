"""The answer caches: L1 in the memory of this process and L2, shared by all replicas."""
