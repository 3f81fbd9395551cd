"""Detect the format of a file by its first bytes, whatever its name is.

gzip and zstd, also nested, and Unicode encodings with a byte order mark are decoded. Content that is
certainly not lines of JSON is rejected with the name of its format.
"""

import codecs
import re
from collections.abc import Iterator

from services.common import json_layout
from services.common.codec import GZIP, MAX_ZSTD_WINDOW_BYTES, PLAIN, ZSTD, Decoder, Format
from services.common.errors import CorruptInputError, UnreadableFormatError
from services.common.json_objects import BOM

# A nested format, and the compression that a store or a proxy may have added.
_MAX_LAYERS = 3
_MAGIC_BYTES = 16
_HEAD_BYTES = 64 * 2**10
# For a text whose first line is longer.
_MAX_HEAD_BYTES = 2**20
# Longer marks come first, since a mark of four bytes begins with one of two.
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    # Without a mark (RFC 4627, section 3): no JSON text holds a NUL.
    (b"{\0\0\0", "utf-32-le"),
    (b"\0\0\0{", "utf-32-be"),
    (b"{\0", "utf-16-le"),
    (b"\0{", "utf-16-be"),
)
_UNSUPPORTED_FORMATS = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xff\x06\0\0sNaPpY", "snappy"),
    (b"LZIP", "lzip"),
    (b"\x1f\x9d", "compress (.Z)"),
    (b"\x78\x01", "zlib"),
    (b"\x78\x9c", "zlib"),
    (b"\x78\xda", "zlib"),
    (b"PAR1", "Parquet"),
    (b"PARE", "Parquet"),
    (b"Obj\x01", "Avro"),
    (b"ORC", "ORC"),
    (b"ARROW1", "Arrow"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
)
# Offset and value of the magic number of a tar archive.
_TAR_MAGIC = (257, b"ustar")
_UNFINISHED_OBJECT_ARRAY = re.compile(
    r"\[\s*\{[^\n]*\Z"
)  # an array of objects, of which the first line is not known whole
# Concatenated files may begin with several byte order marks.
_LEADING_WHITESPACE = re.compile(rb"(?:\s|%b)*" % BOM)
# UTF-16 without a mark whose first character is not `{`: white space or `[`, and one more of ASCII.
_ENCODINGS_WITHOUT_BOM = (
    (re.compile(rb"[ \t\r\n[]\0[^\0]\0"), "utf-16-le"),
    (re.compile(rb"\0[ \t\r\n[]\0[^\0]"), "utf-16-be"),
)
_JSON_ARRAY = "a JSON array, not one JSON object a line; convert it, for instance with `jq -c '.[]'`"
_COMMA_SEPARATED = "JSON objects with commas between them; write one object a line, without the commas"
_MARKUP = "XML or HTML, not one JSON object a line"
_MULTILINE_JSON = (
    "JSON that spans several lines (pretty-printed), not one object a line; convert it, for instance "
    "with `jq -c .`"
)


class DetectingDecoder:
    """Decodes a file by its first bytes.

    State: `_head`, kept until it shows what the file is; from then on `_decoder`, and `_inner`
    for what comes out of it, or neither if the bytes are the text. `hint`: what the text is rather than
    lines of objects, if that is likely.
    """

    def __init__(
        self,
        format_by_name: Format,
        *,
        max_zstd_window_bytes: int = MAX_ZSTD_WINDOW_BYTES,
        layer: int = 0,
    ) -> None:
        self._format_by_name = format_by_name
        self._max_zstd_window_bytes = max_zstd_window_bytes
        self._layer = layer
        self._head: bytes | None = b""
        self._decoder: Decoder | None = None
        self._inner: DetectingDecoder | None = None
        self._hint: str | None = None

    @property
    def hint(self) -> str | None:
        """Return what the text probably is instead of lines of objects, or None."""
        return self._inner.hint if self._inner else self._hint

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes. Raises FileError."""
        if self._head is not None:
            head = self._head = self._head + data
            if len(head) < _MAGIC_BYTES or (
                self._detect_compression(head) is None and not _is_sufficient_head(head)
            ):
                return
            data, self._head = head, None
            self._detect(head)
        yield from self._decode(data)

    def finish(self) -> Iterator[bytes]:
        """Decode the last bytes. Raises FileError."""
        if self._head:
            head, self._head = self._head, None
            self._detect(head)
            yield from self._decode(head)
        if self._decoder is not None:
            last = self._decoder.finish()
            if self._inner is None:
                yield from last
                return
            for text in last:
                yield from self._inner.feed(text)
            yield from self._inner.finish()

    def _decode(self, data: bytes) -> Iterator[bytes]:
        if self._decoder is None:
            yield data
        elif self._inner is None:
            yield from self._decoder.feed(data)
        else:
            for text in self._decoder.feed(data):
                yield from self._inner.feed(text)

    def _detect_compression(self, head: bytes) -> Format | None:
        """Return the compression of bytes that begin, or that truncated could begin, as such."""
        found = next((known for known in (GZIP, ZSTD) if known.matches(head)), None)
        if found is None and self._format_by_name is not PLAIN and self._format_by_name.may_match(head):
            return self._format_by_name
        return found

    def _detect(self, head: bytes) -> None:
        """Choose the decoder for the first bytes. Raises FileError."""
        packed = self._detect_compression(head)
        if packed is not None:
            if self._layer == _MAX_LAYERS:
                message = f"compressed more than {_MAX_LAYERS} times over"
                raise UnreadableFormatError(message)
            self._decoder = packed.decoder(max_zstd_window_bytes=self._max_zstd_window_bytes)
            self._inner = self._inner_decoder(PLAIN)
            return
        encoding = _detect_encoding(head)
        if encoding is not None:
            self._decoder = _Transcoder(encoding)
            self._inner = self._inner_decoder(PLAIN)
            return
        self._reject_other_formats(head)
        self._check_text(head)

    def _inner_decoder(self, format_by_name: Format) -> "DetectingDecoder":
        return DetectingDecoder(
            format_by_name, max_zstd_window_bytes=self._max_zstd_window_bytes, layer=self._layer + 1
        )

    def _reject_other_formats(self, head: bytes) -> None:
        found = next((name for magic, name in _UNSUPPORTED_FORMATS if head.startswith(magic)), None)
        if head.startswith(_TAR_MAGIC[1], _TAR_MAGIC[0]):
            found = "a tar archive"
        if found is not None:
            message = f"its first bytes are those of {found}, which is not read; unpack or convert it"
            raise UnreadableFormatError(message)
        text = _skip_leading_whitespace(head)
        if self._format_by_name is not PLAIN and text and not text.startswith((b"{", b"[")):
            message = (
                f"the compressed input is corrupt: its name ends in {self._format_by_name.suffix}, "
                f"but it begins neither as {self._format_by_name.compression} nor as JSON does"
            )
            raise CorruptInputError(message)

    def _check_text(self, head: bytes) -> None:
        text = _skip_leading_whitespace(head).decode(errors="replace")
        is_array = text.startswith("[")
        if json_layout.spans_multiple_lines(text) or (
            _UNFINISHED_OBJECT_ARRAY.match(text) and len(head) >= _MAX_HEAD_BYTES
        ):
            raise UnreadableFormatError("it is " + (_JSON_ARRAY if is_array else _MULTILINE_JSON))
        if json_layout.has_comma_separated_objects(text):
            raise UnreadableFormatError("it is " + _COMMA_SEPARATED)
        if is_array:
            self._hint = _JSON_ARRAY
        elif text.startswith("<"):
            self._hint = _MARKUP
        elif json_layout.has_comma_after_first_object(text):
            self._hint = _COMMA_SEPARATED


class _Transcoder:
    """Converts a Unicode encoding to UTF-8. A lone surrogate invalidates its line, not the file."""

    def __init__(self, encoding: str) -> None:
        self._name = encoding[:6].upper()
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="surrogatepass")

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield self._to_utf8(data, final=False)

    def finish(self) -> Iterator[bytes]:
        yield self._to_utf8(b"", final=True)

    def _to_utf8(self, data: bytes, *, final: bool) -> bytes:
        try:
            return self._decoder.decode(data, final).encode(errors="surrogatepass")
        except UnicodeDecodeError as error:
            what = (
                "is cut short"
                if "truncated" in error.reason or "end of data" in error.reason
                else (f"is corrupt: {error.reason}")
            )
            message = f"the {self._name} text {what}"
            raise CorruptInputError(message) from error


def _detect_encoding(head: bytes) -> str | None:
    """Return the encoding that the bytes certainly have, or None for UTF-8."""
    marked = next((name for mark, name in _ENCODINGS if head.startswith(mark)), None)
    return marked or next((name for start, name in _ENCODINGS_WITHOUT_BOM if start.match(head)), None)


def _skip_leading_whitespace(head: bytes) -> bytes:
    """Return the head without leading white space and byte order marks."""
    found = _LEADING_WHITESPACE.match(head)
    return head[found.end() :] if found else head


def _is_sufficient_head(head: bytes) -> bool:
    """Return whether the head is large enough to detect its format, with the start of a second line."""
    if not _HEAD_BYTES <= len(head) < _MAX_HEAD_BYTES:
        return len(head) >= _MAX_HEAD_BYTES
    text = _skip_leading_whitespace(head)
    line_end = text.find(b"\n")
    return line_end >= 0 and bool(text[line_end:].strip())
