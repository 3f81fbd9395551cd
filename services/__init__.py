"""One package a service; they meet only at `protos`, never at each other."""
