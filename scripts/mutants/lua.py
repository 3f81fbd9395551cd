"""Mutants of a Lua script: one operator, literal or statement changed at a time.

No mutation tool for Lua 5.1 is maintained. The scripts need only a few kinds of change, which patterns find
outside comments and strings.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_STRING_OR_COMMENT = re.compile(r"--.*|'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"")
_REPLACEMENTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?<![<>=~])<(?!=)"), "<="),
    (re.compile(r"<="), "<"),
    (re.compile(r"(?<![<>=~])>(?!=)"), ">="),
    (re.compile(r">="), ">"),
    (re.compile(r"=="), "~="),
    (re.compile(r"~="), "=="),
    (re.compile(r"\band\b"), "or"),
    (re.compile(r"\bor\b"), "and"),
    (re.compile(r"\bnot\b"), ""),
    (re.compile(r"\btrue\b"), "false"),
    (re.compile(r"\bfalse\b"), "true"),
    (re.compile(r" \+ "), " - "),
    (re.compile(r" - "), " + "),
    (re.compile(r"\bmath\.max\b"), "math.min"),
    (re.compile(r"\bmath\.min\b"), "math.max"),
    (re.compile(r"\b1\b"), "2"),
    (re.compile(r"\b0\b"), "1"),
)
_CALL_STATEMENT = re.compile(r"^\s*[a-z_][\w.]*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*$")


@dataclass(frozen=True, slots=True)
class Mutant:
    """The whole text of a changed script, and what was changed where."""

    text: str
    line: int
    before: str
    after: str


def mutants(script: str) -> Iterator[Mutant]:
    """Yield every mutant of `script`, in the order of its lines."""
    lines = script.split("\n")
    for index, line in enumerate(lines):
        for changed in _changed_lines(line):
            text = "\n".join([*lines[:index], changed, *lines[index + 1 :]])
            yield Mutant(text=text, line=index + 1, before=line.strip(), after=changed.strip())


def _changed_lines(line: str) -> Iterator[str]:
    hidden = _STRING_OR_COMMENT.sub(lambda found: "\0" * len(found.group()), line)
    for pattern, replacement in _REPLACEMENTS:
        for found in pattern.finditer(hidden):
            yield line[: found.start()] + replacement + line[found.end() :]
    if _CALL_STATEMENT.match(hidden.replace("\0", "_")):
        yield ""
