"""Count the names that a listing of INPUT found and ignored."""

from collections import Counter

from services.common.file_names import REASONS_SUFFIX, REJECTS_FOLDER

_COMPRESSIONS = frozenset({"gz", "zst", "bz2", "xz", "zip", "lz4", "br", "snappy", "lzma", "z"})
_MAX_SUFFIXES = 20
_MAX_SUFFIX_CHARACTERS = 12
_OTHER = "other"
_HIDDEN = "hidden"
_NO_SUFFIX = "no suffix"


class NameCounts:
    """Number of listed names.

    State: `files`, the inputs of every shard; `ignored`, the number of other names by suffix.
    """

    def __init__(self) -> None:
        self.files = 0
        self.ignored: Counter[str] = Counter()

    def count_ignored(self, name: str) -> None:
        """Count a name that is no input's. A name that ends in "/" is a folder and not counted."""
        if name and not name.endswith("/"):
            suffix = ignored_suffix(name)
            if suffix not in self.ignored and len(self.ignored) >= _MAX_SUFFIXES:
                suffix = _OTHER
            self.ignored[suffix] += 1

    def describe_ignored(self) -> str:
        """Return the counts as text, largest first."""
        largest_first = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count:,} {suffix}" for suffix, count in largest_first)


def ignored_suffix(name: str) -> str:
    """Return why a name is ignored: its suffix in lower case, or the kind of folder that it is in."""
    folders = name.split("/")
    if REJECTS_FOLDER in folders:
        return REJECTS_FOLDER
    if any(part.startswith(".") for part in folders):
        return _HIDDEN
    base = folders[-1].lower()
    if base.endswith(REASONS_SUFFIX):
        return REASONS_SUFFIX
    stem, dot, suffix = base.rpartition(".")
    if not dot:
        return _NO_SUFFIX
    if suffix in _COMPRESSIONS and "." in stem:
        suffix = f"{stem.rpartition('.')[2]}.{suffix}"
    if len(suffix) > _MAX_SUFFIX_CHARACTERS or suffix.isdigit() or not base.isprintable():
        return _OTHER
    return f".{suffix}"
