"""Detect JSON that is not laid out as one object per line."""

import json
import re

_SPACE = re.compile(r"\s*")
_NEXT_OBJECT = re.compile(r"\s*,\s*\{")
_CHECKED_LINES = 2


def spans_multiple_lines(text: str) -> bool:
    """Return whether the first value begins on the first line and goes on, as JSON, on the next.

    A line that is cut off does not: what follows it begins a value of its own, where none may stand. Where
    the next line's object may stand (behind a colon, for instance), it is the one after it that may not.
    """
    if not text.startswith(("{", "[")):
        return False
    line_end = text.find("\n")
    if line_end < 0:
        return False
    next_line = _SPACE.match(text, line_end)
    assert next_line  # noqa: S101 - it matches nothing too
    try:
        _, end = json.JSONDecoder(parse_int=_discard_digits, parse_float=_discard_digits).raw_decode(text)
    except json.JSONDecodeError as error:
        if error.pos <= next_line.end():
            return False
        return not (text.startswith("{", error.pos) and _is_object(text[next_line.end() : error.pos]))
    except RecursionError:
        return False
    return end > line_end


def has_comma_separated_objects(text: str) -> bool:
    """Return whether two of the first lines are an object and a comma: an array without its brackets.

    The comma ends the first two lines, or begins the second and the third.
    """
    if not text.startswith("{"):
        return False
    lines = [line.strip() for line in text.split("\n", _CHECKED_LINES + 1)[: _CHECKED_LINES + 1]]
    at_end = [line[:-1] for line in lines[:_CHECKED_LINES] if line.endswith(",")]
    at_start = [line[1:] for line in lines[1:] if line.startswith(",")]
    return any(len(some) == _CHECKED_LINES and all(map(_is_object, some)) for some in (at_end, at_start))


def has_comma_after_first_object(text: str) -> bool:
    """Return whether a comma and another object follow the first object."""
    if not text.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder(parse_int=_discard_digits, parse_float=_discard_digits).raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return bool(_NEXT_OBJECT.match(text, end))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_int=_discard_digits, parse_float=_discard_digits), dict)
    except (ValueError, RecursionError):
        return False


def _discard_digits(_digits: str) -> int:
    return 0
