"""The seniority levels that the model answers with."""

# Entry level.
MIN_LEVEL = 1
# Senior executive.
MAX_LEVEL = 7
LEVELS = range(MIN_LEVEL, MAX_LEVEL + 1)
LEVEL_COUNT = len(LEVELS)
