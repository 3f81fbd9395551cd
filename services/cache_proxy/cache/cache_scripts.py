"""The Lua scripts of the store; each makes one decision."""

from pathlib import Path

from services.cache_proxy.redis_client.lua_script import Script

_FOLDER = Path(__file__).parent / "lua"


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
