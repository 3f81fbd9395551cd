"""JSON objects that follow one another on a line without a line end between them.

Delivery streams write files like that, and so does `cat` where a file's last line has no end.
"""

import json
import re

BOM = b"\xef\xbb\xbf"
_BETWEEN_BYTES = b" \t\r" + BOM
_OUTSIDE, _INSIDE = re.compile(rb'["{}\[\]]'), re.compile(rb'["\\]')
_SEAM = re.compile(rb"\}[ \t\r]*(?:\xef\xbb\xbf[ \t\r]*)*\{")
# The same in text, behind the closing brace. A byte order mark is a character there.
_BETWEEN = re.compile("[ \t\r\ufeff]*(?=\\{)")


def _ignore(_value: str) -> int:
    """Return nothing of a number: `int` refuses one of 5,000 digits."""
    return 0


_scan = json.JSONDecoder(
    parse_int=_ignore, parse_float=_ignore, parse_constant=_ignore, strict=False
).raw_decode


def has_seam(text: bytes | bytearray, start: int = 0) -> bool:
    """Return whether an object may end and another begin on the same line (or it is in a string)."""
    return _SEAM.search(text, start) is not None


def split(line: bytes) -> list[bytes]:
    """Return each of a line's objects, or the line itself if it has fewer than two.

    From the first object on that cannot be read, the rest of the line is one piece.
    """
    parts, rest = leading(line)
    return [*parts, rest]


def leading(text: bytes) -> tuple[list[bytes], bytes]:
    """Return the objects that are followed by another, and what is left from the last `{` of them on.

    All bytes are kept, but for the white space and byte order marks between two objects. An object is only
    split from the next where a JSON reader ends it: `}{` in a string is text.
    """
    parts: list[bytes] = []
    if not has_seam(text):
        return parts, text
    decoded = text.decode(errors="surrogateescape")  # bytes that are not UTF-8 are another check's
    start, position = 0, _first(decoded)
    while decoded.startswith("{", position):
        try:
            _, end = _scan(decoded, position)
        except (ValueError, RecursionError):
            break
        between = _BETWEEN.match(decoded, end)
        if between is None:
            break
        parts.append(decoded[start:end].encode(errors="surrogateescape"))
        start = position = between.end()
    return parts, decoded[start:].encode(errors="surrogateescape") if parts else text


def _first(decoded: str) -> int:
    found = _BETWEEN.match(decoded)
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
        self._is_over = self._is_lost = not line.lstrip(_BETWEEN_BYTES).startswith(b"{")

    def feed(self, data: bytes | bytearray) -> int:
        """Return where in `data` the next object begins, or -1."""
        position = 0
        while not self._is_over:
            position = self._scan(data, position)
            if position < 0:
                return -1
        while position < len(data) and not self._is_lost:
            if data[position] == ord("{"):
                return position
            self._is_lost = data[position] not in _BETWEEN_BYTES
            position += 1
        return -1

    def _scan(self, data: bytes | bytearray, position: int) -> int:
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
            self._is_over = self._depth <= 0
        return found.end()
