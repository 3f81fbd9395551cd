"""Formats by name, and their streaming codecs: bytes in, bytes out, memory bounded.

Compressed input is fed to the decompressor in small slices, because what comes out of one slice is held
whole: with deflate at most about a thousandfold, so 4 MiB; with zstd 128 KiB for every 4 bytes, so 8 MiB.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import zstandard

from services.common.errors import CorruptInputError, WindowTooLargeError

_GZIP_SLICE_BYTES = 4096
_ZSTD_SLICE_BYTES = 256
_GZIP_WINDOW_BITS: Final = 31  # zlib's way to say "gzip, with its header and checksum"
_ZSTD_LEVEL = 3
# Each file in work holds a window. RFC 8878 asks a reader for this; only `--long` and `--ultra` make larger.
MAX_ZSTD_WINDOW_BYTES = 8 * 2**20
_ZSTD_WINDOW_ERROR = "requires too much memory"  # zstd's own words: it has no code that tells it apart
_BASE_SUFFIXES = (".jsonl", ".ndjson", ".jl", ".json")


class Decoder(Protocol):
    """Turns a file's bytes into its text's bytes."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes."""

    def finish(self) -> Iterator[bytes]:
        """Decode the last bytes. Raises CorruptInputError if that cannot be the end."""


class Encoder(Protocol):
    """Turns text bytes into a file's bytes; `flush` gives the last ones."""

    def compress(self, data: bytes, /) -> bytes:
        """Encode the next bytes."""

    def flush(self) -> bytes:
        """End the file."""


class _PlainCodec:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> Iterator[bytes]:
        return iter(())

    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class _FrameDecoder:
    """Compressed frames (gzip members, zstd frames), one after the other until the end of the file."""

    def __init__(
        self,
        file_format: "Format",
        new_frame: Callable[[], Any],
        *,
        slice_bytes: int,
        padding: bytes = b"",
        max_window_bytes: int = MAX_ZSTD_WINDOW_BYTES,
    ) -> None:
        self._format = file_format
        self._max_window_bytes = max_window_bytes
        self._new_frame = new_frame
        self._slice_bytes = slice_bytes
        self._padding = padding  # what may stand between and behind frames
        self._has_frames = False
        self._frame: Any = None  # None: between frames
        self._pending = b""  # fewer bytes than tell whether another frame begins

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), self._slice_bytes):
            rest = data[start : start + self._slice_bytes]
            while rest:
                if self._frame is None:
                    rest = self._next_frame_start(rest)
                    if not rest:
                        break
                    self._frame, self._has_frames = self._new_frame(), True
                try:
                    yield self._frame.decompress(rest)
                except (zlib.error, zstandard.ZstdError, MemoryError) as error:
                    if _ZSTD_WINDOW_ERROR in str(error):
                        raise WindowTooLargeError(limit_bytes=self._max_window_bytes) from error
                    message = f"the compressed input is corrupt: {error}"
                    raise CorruptInputError(message) from error
                rest = b""
                if self._frame.eof:
                    rest, self._frame = self._frame.unused_data, None

    def _next_frame_start(self, rest: bytes) -> bytes:
        """Return the bytes that the next frame begins with, none while they are too few."""
        if self._has_frames and not self._pending:
            rest = rest.lstrip(self._padding) if self._padding else rest
        rest = self._pending + rest
        self._pending = b""
        if self._format.may_match(rest):
            self._pending = rest
            return b""
        if rest and not self._format.matches(rest):
            self._raise_corrupt()
        return rest

    def _raise_corrupt(self) -> None:
        name = self._format.compression
        if self._has_frames:
            message = f"the compressed input is corrupt: bytes that are not {name} follow the {name} data"
        else:
            message = f"the compressed input is corrupt: it does not begin as {name} does"
        raise CorruptInputError(message)

    def finish(self) -> Iterator[bytes]:
        if self._pending and self._has_frames:
            self._raise_corrupt()
        if self._frame is not None or self._pending:
            raise CorruptInputError("the compressed input is cut short")
        return iter(())


@dataclass(frozen=True, eq=False)
class Format:
    """A way to store lines, known by its suffix. `compression` is its name, empty for plain text."""

    suffix: str
    compression: str = ""
    magics: tuple[bytes, ...] = ()

    @property
    def suffix_help(self) -> str:
        """What its files' names end in, for people."""
        return ", ".join(base + self.suffix for base in _BASE_SUFFIXES)

    def matches(self, data: bytes) -> bool:
        """Return whether a file of this format begins with these bytes."""
        return data.startswith(self.magics)

    def may_match(self, data: bytes) -> bool:
        """Return whether more bytes are needed to know."""
        return any(len(data) < len(magic) and magic.startswith(data) for magic in self.magics)

    def decoder(self, *, max_zstd_window_bytes: int = MAX_ZSTD_WINDOW_BYTES) -> Decoder:
        """Return a decoder that takes nothing but this format."""
        if self is GZIP:
            return _FrameDecoder(
                self,
                lambda: zlib.decompressobj(wbits=_GZIP_WINDOW_BITS),
                slice_bytes=_GZIP_SLICE_BYTES,
                padding=b"\0",
            )
        if self is PLAIN:
            return _PlainCodec()
        return _FrameDecoder(
            self,
            lambda: zstandard.ZstdDecompressor(max_window_size=max_zstd_window_bytes).decompressobj(),
            slice_bytes=_ZSTD_SLICE_BYTES,
            max_window_bytes=max_zstd_window_bytes,
        )

    def encoder(self) -> Encoder:
        """Return an encoder into this format."""
        if self is PLAIN:
            return _PlainCodec()
        if self is GZIP:
            return zlib.compressobj(wbits=_GZIP_WINDOW_BITS)
        return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()


PLAIN = Format("")
GZIP = Format(".gz", "gzip", (b"\x1f\x8b",))
# The last sixteen begin a frame that holds something else than text, and is skipped.
ZSTD = Format(
    ".zst",
    "zstd",
    (b"\x28\xb5\x2f\xfd", *(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))),
)
FORMATS = (PLAIN, GZIP, ZSTD)
SUFFIXES = tuple(base + known.suffix for base in _BASE_SUFFIXES for known in FORMATS)
SUFFIX_HELP = f"{', '.join(_BASE_SUFFIXES)}, each also with {GZIP.suffix} or {ZSTD.suffix}, in any case"
"""For people: what the name of a file of lines ends in."""


def format_for_name(name: str) -> Format | None:
    """Return the format that a file's name says, if it says one."""
    lower = name.lower()
    for known in FORMATS:
        if lower.endswith(known.suffix) and lower.removesuffix(known.suffix).endswith(_BASE_SUFFIXES):
            return known
    return None
