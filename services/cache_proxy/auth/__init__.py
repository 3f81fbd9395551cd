"""Authentication of callers, and of the proxy towards the model, by certificates and bearer tokens."""
