"""Decide by name which files are read."""

from services.common.codec import format_for_name

REJECTS_FOLDER = "_rejects"
REASONS_SUFFIX = ".reasons.jsonl"


def is_input(name: str) -> bool:
    """Return whether a file is an input: of a known format, not hidden, and not an output of rejects.

    The name is relative to the folder or prefix that is read, with "/".
    """
    if format_for_name(name) is None or is_excluded(name):
        return False
    return not (name.endswith(REASONS_SUFFIX) and format_for_name(name.removesuffix(REASONS_SUFFIX)))


def is_excluded(name: str) -> bool:
    """Return whether the file or one of its folders is hidden or holds rejects."""
    return any(part.startswith(".") or part == REJECTS_FOLDER for part in name.split("/"))
