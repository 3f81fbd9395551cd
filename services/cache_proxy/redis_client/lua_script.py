"""Load Lua scripts with the files that they include."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

_INCLUDE = re.compile(r'^-- @include "([a-z_]+)"$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: its text, and the SHA-1 by which Redis knows it after it has run once."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        """Compute the SHA-1."""
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)


def load_script(path: Path, *, header: str = "") -> Script:
    """Return the script in a file, after `header` and the files that it includes.

    A line `-- @include "NAME"` includes `include/NAME.lua` from the folder of the script. An included file
    may include others. Each is inserted once, before the file that first includes it.
    """
    parts: list[str] = []
    _collect(path, folder=path.parent / "include", seen=set(), parts=parts)
    return Script(header + "".join(parts))


def _collect(path: Path, *, folder: Path, seen: set[Path], parts: list[str]) -> None:
    seen.add(path)
    text = path.read_text(encoding="utf-8")
    for name in _INCLUDE.findall(text):
        included = folder / f"{name}.lua"
        if included not in seen:
            _collect(included, folder=folder, seen=seen, parts=parts)
    parts.append(text)
