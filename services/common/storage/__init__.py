"""Folders and buckets behind one small protocol."""
