"""Fuzz tests that compare the parsers with slower reference implementations.

`corpus/` has one file a case, named for what is unusual about it. Every run replays all cases, and mutates
some. Bytes that were found to break something become a file there.
"""
