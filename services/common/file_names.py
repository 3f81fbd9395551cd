"""Which files are read, by their names."""

from services.common.codec import format_for_name

REJECTS_FOLDER = "_rejects"
REASONS_SUFFIX = ".reasons.jsonl"


def is_input(name: str) -> bool:
    """Return whether a file is read: a known format, not hidden, and neither rejected lines nor reasons.

    The name is relative to the folder or prefix that is read, with "/".
    """
    if format_for_name(name) is None or is_excluded(name):
        return False
    return not (name.endswith(REASONS_SUFFIX) and format_for_name(name.removesuffix(REASONS_SUFFIX)))


def is_excluded(name: str) -> bool:
    """Return whether the name, or a folder in it, is hidden or one of rejected lines."""
    return any(part.startswith(".") or part == REJECTS_FOLDER for part in name.split("/"))
