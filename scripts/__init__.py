"""What keeps generated files true: stubs and locks."""
