"""The commands about the cache itself, which ask neither a proxy nor the model."""
