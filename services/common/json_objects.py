"""Split JSON objects that follow one another on one line without a line feed between them.

Delivery streams write such files, and so does `cat` if the last line of a file has no line feed.
"""

import json
import re

BOM = b"\xef\xbb\xbf"
_SEPARATOR_BYTES = b" \t\r" + BOM
_OUTSIDE = re.compile(rb'["{}\[\]]')
_INSIDE = re.compile(rb'["\\]')
_OBJECT_BOUNDARY = re.compile(rb"\}[ \t\r]*(?:\xef\xbb\xbf[ \t\r]*)*\{")
# The same in text, behind the closing brace. A byte order mark is a character there.
_SEPARATOR = re.compile("[ \t\r\ufeff]*(?=\\{)")


def _discard_digits(_value: str) -> int:
    """Return nothing of a number: `int` refuses one of 5,000 digits."""
    return 0


_decode_value = json.JSONDecoder(
    parse_int=_discard_digits, parse_float=_discard_digits, parse_constant=_discard_digits, strict=False
).raw_decode


def has_object_boundary(text: bytes | bytearray, start: int = 0) -> bool:
    """Return whether an object may end and another begin on the same line (or it is in a string)."""
    return _OBJECT_BOUNDARY.search(text, start) is not None


def split_objects(line: bytes) -> list[bytes]:
    """Return each of a line's objects, or the line itself if it has fewer than two.

    From the first object on that cannot be read, the rest of the line is one piece.
    """
    parts, rest = split_leading(line)
    return [*parts, rest]


def split_leading(text: bytes) -> tuple[list[bytes], bytes]:
    """Return the objects that are followed by another, and what is left from the last `{` of them on.

    All bytes are kept, but for the white space and byte order marks between two objects. An object is only
    split from the next where a JSON reader ends it: `}{` in a string is text.
    """
    parts: list[bytes] = []
    if not has_object_boundary(text):
        return parts, text
    # Invalid UTF-8 is detected elsewhere.
    decoded = text.decode(errors="surrogateescape")
    start, position = 0, _skip_separator(decoded)
    while decoded.startswith("{", position):
        try:
            _, end = _decode_value(decoded, position)
        except (ValueError, RecursionError):
            break
        between = _SEPARATOR.match(decoded, end)
        if between is None:
            break
        parts.append(decoded[start:end].encode(errors="surrogateescape"))
        start = position = between.end()
    return parts, decoded[start:].encode(errors="surrogateescape") if parts else text


def _skip_separator(decoded: str) -> int:
    found = _SEPARATOR.match(decoded)
    return found.end() if found else 0


class ObjectScanner:
    """Finds where an object too large to be parsed ends, if another one follows it on the same line.

    State: `_depth` (of braces and brackets), `_in_string`, `_is_escaped` (the next byte, in a string);
    `_is_over`: the object ended; `_is_lost`: what followed it is no object, or the line begins with none.
    """

    def __init__(self, line: bytes | bytearray) -> None:
        """Begin before the line, of which some is known."""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._has_ended = self._has_no_next = not line.lstrip(_SEPARATOR_BYTES).startswith(b"{")

    def feed(self, data: bytes | bytearray) -> int:
        """Return where in `data` the next object begins, or -1."""
        position = 0
        while not self._has_ended:
            position = self._scan_next(data, position)
            if position < 0:
                return -1
        while position < len(data) and not self._has_no_next:
            if data[position] == ord("{"):
                return position
            self._has_no_next = data[position] not in _SEPARATOR_BYTES
            position += 1
        return -1

    def _scan_next(self, data: bytes | bytearray, position: int) -> int:
        """Return where to go on behind the next byte that matters, or -1 if there is none."""
        if self._is_escaped:
            self._is_escaped = position >= len(data)
            return -1 if self._is_escaped else position + 1
        found = (_INSIDE if self._in_string else _OUTSIDE).search(data, position)
        if found is None:
            return -1
        byte = found[0]
        if byte == b'"':
            self._in_string = not self._in_string
        elif byte == b"\\":
            self._is_escaped = True
        elif byte in b"{[":
            self._depth += 1
        else:
            self._depth -= 1
            self._has_ended = self._depth <= 0
        return found.end()
