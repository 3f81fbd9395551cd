"""Bytes of strangers, against readers that are slower and known to be right.

`corpus/` holds a case a file, named for what is odd about it: every run replays all, and mutates some.
Bytes that were found to break something become a file there.
"""
