"""The levels that the model gives."""

MIN_LEVEL = 1  # entry
MAX_LEVEL = 7  # senior executive
