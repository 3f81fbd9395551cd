"""The work on one file: read, parse, look up, splice, write."""
