"""Parses lines of JSON into postings. No I/O.

msgspec parses nearly all lines. A line that it refuses is parsed again by `json`, which is exact about valid
but unusual lines (a lone surrogate elsewhere in the object, a `null` that a later member replaces) and about
the reason when the line is rejected.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, TypeAlias

import msgspec

from services.augmenter.domain import Pair
from services.common.posting_fields import DEFAULT_FIELDS, Path, PostingFields, text_at

# White space that JSON allows around a value, except for the end of the line.
_WHITESPACE = b" \t\r"
_BOM = b"\xef\xbb\xbf"


class Posting(msgspec.Struct, frozen=True, gc=False):
    """The relevant part of a line: company and title, and whether the object has a level already."""

    pair: Pair
    has_level: bool = False


class KeptLine:
    """A line that is written unchanged, since it has a level already."""


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that cannot be augmented, and the reason."""

    reason: str


KEPT = KeptLine()
# None stands for a blank line.
ParsedLine: TypeAlias = Posting | KeptLine | RejectedLine | None
_ANY_VALUE = msgspec.Raw | msgspec.UnsetType
_SURROGATE = re.compile("[\ud800-\udfff]")


def strip_line(line: bytes) -> bytes:
    """Return the line without outer white space, and without the byte order marks of a first line."""
    text = line.strip(_WHITESPACE)
    while text.startswith(_BOM):
        text = text.removeprefix(_BOM).lstrip(_WHITESPACE)
    return text


class PostingParser:
    """Parses lines, given the names of their fields. `keep_existing`: lines that have a level are kept."""

    def __init__(self, fields: PostingFields = DEFAULT_FIELDS, *, keep_existing: bool = False) -> None:
        self._fields = fields
        self._keep_existing = keep_existing
        self._get_texts = fields.pair_getter
        self._decode = msgspec.json.Decoder(fields.make_struct("Posting", _ANY_VALUE, msgspec.UNSET)).decode
        self._decode_plain = _plain_decoder(fields)

    def parse(self, texts: Sequence[bytes]) -> list[ParsedLine]:
        """Return what each stripped line holds."""
        return [self._parse_line(text) for text in texts]

    def parse_plain(self, text: bytes, count: int) -> tuple[list[bytes], list[Pair]] | None:
        """Return the lines without their outer braces, and their pairs, if all `count` lines are plain.

        Return None if any line is blank, invalid or unusual, has white space around it, or has a level
        already.

        All lines are decoded as one text. Every line feed must stand between `}` and `{`. No JSON value, and
        no string, can contain that. So if there are as many values as lines, there is one on each line.
        """
        if not (text.startswith(b"{") and text.endswith(b"}")):
            return None
        try:
            # msgspec does not validate the text of members that it skips.
            _ = text.isascii() or text.decode()
            pairs = self._decode_plain(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        inner = text[1:-1].split(b"}\n{")
        return (inner, pairs) if len(pairs) == len(inner) == count else None

    def _parse_line(self, text: bytes) -> ParsedLine:
        if not text:
            return None
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            return RejectedLine(f"not valid UTF-8 (byte {error.start + 1})")
        try:
            found: Any = self._decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._parse_with_json(decoded)
        has_level = found.level is not msgspec.UNSET
        return (
            KEPT if has_level and self._keep_existing else Posting(Pair(*self._get_texts(found)), has_level)
        )

    def _parse_with_json(self, text: str) -> ParsedLine:
        try:
            value = _load_object(text)
        except ValueError as error:
            return RejectedLine(str(error))
        has_level = self._fields.level in value
        if has_level and self._keep_existing:
            return KEPT
        try:
            pair = Pair(
                _valid_text_at(value, self._fields.company), _valid_text_at(value, self._fields.title)
            )
        except ValueError as error:
            return RejectedLine(str(error))
        return Posting(pair, has_level)


def _plain_decoder(fields: PostingFields) -> Callable[[bytes], list[Pair]]:
    """Return a function that decodes lines of postings without a level."""
    if fields == DEFAULT_FIELDS:
        return msgspec.json.Decoder(Pair).decode_lines
    decode_lines = msgspec.json.Decoder(
        fields.make_struct("Plain", msgspec.UnsetType, msgspec.UNSET)
    ).decode_lines
    getter = fields.pair_getter
    return lambda text: list(starmap(Pair, map(getter, decode_lines(text))))


def _load_object(text: str) -> dict[str, Any]:
    """Return the JSON object. Raises ValueError with the reason if the text is not one."""
    try:
        value = json.loads(
            text, parse_constant=_reject_constant, parse_int=_skip_number, parse_float=_skip_number
        )
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} (character {error.pos + 1})"
        raise ValueError(message) from error
    except ValueError as error:
        message = f"not JSON: {error}"
        raise ValueError(message) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - it is the text that is wrong
    return value


def _valid_text_at(value: Any, path: Path) -> str:
    text = text_at(value, path)
    if _SURROGATE.search(text):
        message = f"{'.'.join(path)} holds a lone surrogate, which is not text"
        raise ValueError(message)
    return text


def _reject_constant(constant: str) -> Any:
    message = f"{constant} is not a JSON value"
    raise ValueError(message)


def _skip_number(_digits: str) -> int:
    """Replace a number by 0: numbers need not be read, and `int` would refuse one of 5,000 digits."""
    return 0


_default_parser = PostingParser()
parse = _default_parser.parse
parse_plain = _default_parser.parse_plain
