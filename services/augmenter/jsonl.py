"""Lines of JSON: what they ask for, and the level spliced into their own bytes. Pure.

A line is parsed twice only when it must be: msgspec reads what nearly all lines are; what it refuses is
read again by `json`, which is exact about the odd but lawful (a lone surrogate somewhere else in the
object, a `null` that a later member replaces) and about the reason when the line is rejected.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

_SPACE = b" \t\r"  # what JSON lets stand around a value, the line's end aside
_BOM = b"\xef\xbb\xbf"


class Pair(msgspec.Struct, frozen=True, gc=False):
    """What is asked; made, hashed and compared without a step of Python, and not tracked by the collector.

    Read from a line, it is of one without a `seniority`: there is no value that this type takes.
    """

    company: str
    title: str
    seniority: msgspec.UnsetType = msgspec.UNSET


class Posting(msgspec.Struct, frozen=True, gc=False):
    """What matters in a line: company and title, and whether the object has a `seniority` already."""

    company: str
    title: str
    seniority: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    @property
    def pair(self) -> Pair:
        """What is asked."""
        return Pair(self.company, self.title)

    @property
    def has_seniority(self) -> bool:
        """Whether there is one to be replaced."""
        return self.seniority is not msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that cannot be augmented, and why."""

    reason: str


Entry: TypeAlias = Posting | Rejected | None  # None: a blank line
_decode = msgspec.json.Decoder(Posting).decode
_decode_plain = msgspec.json.Decoder(Pair).decode_lines
_SURROGATE = re.compile("[\ud800-\udfff]")


def strip(line: bytes) -> bytes:
    """The line without its outer white space, and without a byte order mark: it was a file's first line."""
    text = line.strip(_SPACE)
    while text.startswith(_BOM):
        text = text.removeprefix(_BOM).lstrip(_SPACE)
    return text


def parse(texts: Sequence[bytes]) -> list[Entry]:
    """What each stripped line holds."""
    return [_parse_line(text) for text in texts]


def parse_plain(text: bytes, count: int) -> tuple[list[bytes], list[Pair]] | None:
    """So many lines without their outer braces, and what they hold, if all are as plain as nearly all are.

    None: at least one is blank, bad, odd, has white space around it or a `seniority` already.

    Every line feed stands between `}` and `{`. No JSON value can span that, nor can a string; so the values
    that are read from the text as a whole are one a line, if there are as many.
    """
    if not (text.startswith(b"{") and text.endswith(b"}")):
        return None
    try:
        _ = text.isascii() or text.decode()  # msgspec does not look at the text of members that it skips
        pairs = _decode_plain(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    inner = text[1:-1].split(b"}\n{")
    return (inner, pairs) if len(pairs) == len(inner) == count else None


def _parse_line(text: bytes) -> Entry:
    if not text:
        return None
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        return Rejected(f"not valid UTF-8 (byte {error.start + 1})")
    try:
        return _decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _parse_exactly(decoded)


def _parse_exactly(text: str) -> Posting | Rejected:
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_number, parse_float=_number)
    except json.JSONDecodeError as error:
        return Rejected(f"not JSON: {error.msg} (character {error.pos + 1})")
    except ValueError as error:
        return Rejected(f"not JSON: {error}")
    except RecursionError:
        return Rejected("nested too deeply")
    if not isinstance(value, dict):
        return Rejected("not a JSON object")
    wrong = _wrong(value, "company") or _wrong(value, "title")
    if wrong:
        return Rejected(wrong)
    existing = msgspec.Raw() if "seniority" in value else msgspec.UNSET
    return Posting(company=value["company"], title=value["title"], seniority=existing)


def _wrong(value: dict[str, Any], name: str) -> str | None:
    if name not in value:
        return f"{name} is missing"
    if not isinstance(value[name], str):
        return f"{name} is not a string"
    if _SURROGATE.search(value[name]):
        return f"{name} holds a lone surrogate, which is not text"
    return None


def _refuse(constant: str) -> Any:
    message = f"{constant} is not a JSON value"
    raise ValueError(message)


def _number(_digits: str) -> int:
    """Numbers are checked, not read: `int` would refuse one of 5,000 digits."""
    return 0
