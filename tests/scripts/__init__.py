"""The tools of this project."""
