"""Lua scripts and their includes."""

import hashlib
from pathlib import Path

from services.cache_proxy.redis_client.lua_script import load_script


def test_included_files_come_first_and_once(tmp_path: Path) -> None:
    """An include of an include comes before it; two files that include the same one share it."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include/clock.lua").write_text("local now\n")
    (tmp_path / "include/pairs.lua").write_text('-- @include "clock"\nlocal pairs\n')
    script = tmp_path / "claim.lua"
    script.write_text('-- @include "pairs"\n-- @include "clock"\nreturn now\n')
    loaded = load_script(script, header="local FORMAT = 1\n")
    lines = [line for line in loaded.text.splitlines() if not line.startswith("--")]
    assert lines == ["local FORMAT = 1", "local now", "local pairs", "return now"]


def test_name_in_redis_is_the_hash_of_the_text(tmp_path: Path) -> None:
    """EVALSHA finds the script that EVAL has loaded."""
    script = tmp_path / "one.lua"
    script.write_text("return 1")
    assert load_script(script).sha == hashlib.sha1(b"return 1").hexdigest()
