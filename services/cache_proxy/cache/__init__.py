"""The cached levels: in the process (L1) and shared by all replicas (L2)."""
