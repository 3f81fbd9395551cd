"""What hostile callers, bytes and neighbours get."""
