"""The form of the Lua files, for which no linter runs."""

import re
from pathlib import Path

import pytest

from services import cache_proxy

MAX_COLUMNS = 110
SHARED = {"prelude", "layout", "bucket_writes"}
"""Files that are put in front of scripts: they have no reply."""

FILES = sorted(Path(cache_proxy.__path__[0]).rglob("*.lua"))
_STRING = re.compile(r"'[^']*'|\"[^\"]*\"")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lines_are_short_and_comments_stand_alone(path: Path) -> None:
    """A line has at most 110 columns, and a comment is above the code that it explains."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        code = _STRING.sub("''", line).strip()
        assert len(line) <= MAX_COLUMNS, f"{path.name}:{number}"
        assert code.startswith("--") or "--" not in code, f"{path.name}:{number}"
        assert ";" not in code or code.startswith("--"), f"{path.name}:{number}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_head_names_inputs_and_reply(path: Path) -> None:
    """Every argument that a script reads is described at its head, and so is its reply."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    head = "\n".join(lines[: next(at for at, line in enumerate(lines) if line and not line.startswith("--"))])
    used = {int(number) for number in re.findall(r"\bARGV\[(\d+)\]", text.replace(head, ""))}
    described = {int(number) for number in re.findall(r"\[(\d+)", head)}
    assert used <= described
    assert path.stem in SHARED or re.search(r"^-- (Reply|Returns) ", head, re.MULTILINE)
