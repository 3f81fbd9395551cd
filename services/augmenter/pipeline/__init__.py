"""Processing of one file from INPUT to OUTPUT: read, parse, augment, write."""
