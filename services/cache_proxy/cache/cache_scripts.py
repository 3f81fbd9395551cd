"""The store's Lua scripts: each one decision, behind a prelude that they share."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

_FOLDER = Path(__file__).parent / "lua"


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text, and the name by which Redis knows it once it has run."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        """Name it."""
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)


def _load_script(*names: str) -> Script:
    return Script("".join((_FOLDER / f"{name}.lua").read_text(encoding="utf-8") for name in names))


GET = _load_script("layout", "get")
PUT = _load_script("layout", "bucket_writes", "put")
DELETE = _load_script("layout", "bucket_writes", "delete")
CLEAR = _load_script("layout", "bucket_writes", "clear")
SWEEP = _load_script("layout", "bucket_writes", "sweep")
INSPECT = _load_script("layout", "inspect")
ADD_TOMBSTONES = _load_script("add_tombstones")
TOMBSTONE_AGES = _load_script("tombstone_ages")
CHECK_ACCESS = _load_script("check_access")
