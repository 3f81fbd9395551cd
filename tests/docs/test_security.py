"""The table of attacks names tests that are there."""

import re

from tests.support.processes import ROOT


def test_every_test_of_the_table_exists() -> None:
    """By file and name; `…::name` is one of the file named before."""
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_0-9/]+\.py|…)(?:::(\w+))?`", page)
    assert len(named) > 30
    path = ""
    for file, test in named:
        path = path if file == "…" else file
        text = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in text, f"{path}::{test}"
