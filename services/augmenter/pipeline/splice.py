"""Inserts a level into the bytes of a JSON object and leaves all other bytes as they are.

The text is known to be one valid JSON object, so the scanner only finds where members begin and end.
"""

import json
import re
from collections.abc import Iterator

from services.common.levels import MAX_LEVEL, MIN_LEVEL
from services.common.posting_fields import DEFAULT_FIELDS

_LAST_MEMBER = re.compile(rb'"[^"]*"[ \t\r\n]*:[ \t\r\n]*(?:"[^"]*"|[^"{}\[\],:\s]+)\}')
_WHITESPACE = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SCALAR = re.compile(rb"[^,}\]\s]+")
_STRUCTURE = re.compile(rb'[^"{}\[\]]*(?:(")|([{\[])|([}\]]))')


class Splicer:
    """Inserts levels into objects, as a member of this name."""

    def __init__(self, name: str = DEFAULT_FIELDS.level) -> None:
        self._name = name.encode()
        self._quoted_name = json.dumps(name, ensure_ascii=False).encode()
        self._level_suffixes = {
            level: b", %b: %d}\n" % (self._quoted_name, level) for level in range(MIN_LEVEL, MAX_LEVEL + 1)
        }

    def splice_levels(self, unbraced_lines: list[bytes], levels: bytes) -> list[bytes]:
        """Insert a level into each object. None of them has such a member yet.

        The objects are given without their outer braces. The parts that are returned are to be joined.
        """
        parts = [b"{"] * (3 * len(unbraced_lines))
        parts[1::3] = unbraced_lines
        parts[2::3] = map(self._level_suffixes.__getitem__, levels)
        return parts

    def splice_level(self, text: bytes, level: int, *, replace: bool) -> bytes:
        """Return the object with the level as its last member, and a line end.

        `replace`: the object has members of that name, which are removed. It must have another member, too.
        """
        if not replace:
            return text[:-1] + self._level_suffixes[level]
        comma = self._comma_before_last(text)
        if comma > 0:
            return text[:comma] + self._level_suffixes[level]
        return self._remove_level(text)[:-1] + self._level_suffixes[level]

    def _comma_before_last(self, text: bytes) -> int:
        """Return the position of the comma before the last member, if that is the only member of the name.

        Return -1 if that takes a scan to find out. Lines that the augmenter wrote itself have this form,
        and the check takes a twentieth of a scan. In a text without a backslash, a match of the quoted name
        is a whole string. Followed by a colon it is a member's name, and since only the closing brace follows
        the value, the member belongs to the object itself.
        """
        start = text.find(self._quoted_name)
        is_last_member = start > 0 and b"\\" not in text and _LAST_MEMBER.fullmatch(text, start)
        if not is_last_member:
            return -1
        before = text[:start].rstrip(b" \t\r\n")
        return len(before) - 1 if before.endswith(b",") else -1

    def _remove_level(self, text: bytes) -> bytes:
        """Return the object without its own members of the name. Each is removed together with one comma."""
        kept: list[bytes] = []
        # The text up to `copied` has been kept or dropped.
        copied = 0
        # The comma after the last kept member, -1 while every member was dropped.
        previous_comma = -1
        for start, end, name in _iter_members(text):
            # The comma after the member, or the closing brace.
            comma = _skip_whitespace(text, end)
            if name != self._name:
                previous_comma = comma
            elif previous_comma < 0:
                # No member is kept before it, so the comma after it is removed.
                kept.append(text[copied:start])
                copied = comma + 1
            else:
                # The comma before it is removed.
                kept.append(text[copied:previous_comma])
                copied = end
                previous_comma = comma
        kept.append(text[copied:])
        return b"".join(kept)


def _iter_members(text: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield where each member of the object begins and ends, and its name."""
    position = _skip_whitespace(text, 1)
    while text[position] != ord("}"):
        start = position
        key_end = _string_end(text, start)
        key = text[start + 1 : key_end - 1]
        if b"\\" in key:
            key = json.loads(text[start:key_end]).encode(errors="surrogatepass")
        end = _value_end(text, _skip_whitespace(text, _skip_whitespace(text, key_end) + 1))
        yield start, end, key
        position = _skip_whitespace(text, end)
        if text[position] == ord(","):
            position = _skip_whitespace(text, position + 1)


def _skip_whitespace(text: bytes, position: int) -> int:
    return _match_at(_WHITESPACE, text, position).end()


def _string_end(text: bytes, position: int) -> int:
    return _match_at(_STRING, text, position).end()


def _value_end(text: bytes, position: int) -> int:
    if text[position] == ord('"'):
        return _string_end(text, position)
    if text[position] not in b"{[":
        return _match_at(_SCALAR, text, position).end()
    depth = 0
    # A loop instead of recursion, since lines may be nested to any depth.
    while True:
        found = _match_at(_STRUCTURE, text, position)
        position = found.end()
        if found[1]:
            position = _string_end(text, position - 1)
        elif found[2]:
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return position


def _match_at(pattern: re.Pattern[bytes], text: bytes, position: int) -> re.Match[bytes]:
    found = pattern.match(text, position)
    if found is None:
        message = f"not a valid JSON object (byte {position + 1})"
        raise ValueError(message)
    return found


splice_level = Splicer().splice_level
