"""Tests against hostile callers, requests and processes on the same machine."""
