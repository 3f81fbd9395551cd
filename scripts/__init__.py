"""Tools that generate and check files of this repository."""
