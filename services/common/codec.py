"""Formats by name, and their streaming codecs: bytes in, bytes out, memory bounded.

Compressed input is fed to the decompressor in small slices, because what comes out of one slice is held
whole: with deflate at most about a thousandfold, so 4 MiB; with zstd 128 KiB for every 4 bytes, so 8 MiB.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import zstandard

from services.common.errors import CorruptInputError, WindowTooLargeError

_GZIP_SLICE_BYTES = 4096
_ZSTD_SLICE_BYTES = 256
_GZIP_WINDOW_BITS: Final = 31  # zlib's way to say "gzip, with its header and checksum"
_ZSTD_LEVEL = 3
# Each file in work holds a window. RFC 8878 asks a reader for this; only `--long` and `--ultra` make larger.
_ZSTD_WINDOW_BYTES = 8 * 2**20
_ZSTD_WINDOW_TOO_LARGE = "requires too much memory"  # zstd's own words: it has no code that tells it apart


class Decoder(Protocol):
    """Turns a file's bytes into its text's bytes."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes."""

    def finish(self) -> None:
        """Say that there are no more; raises CorruptInputError if that cannot be the end."""


class Encoder(Protocol):
    """Turns text bytes into a file's bytes; `flush` gives the last ones."""

    def compress(self, data: bytes, /) -> bytes:
        """Encode the next bytes."""

    def flush(self) -> bytes:
        """End the file."""


class _Plain:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        pass

    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class _Frames:
    """Compressed frames (gzip members, zstd frames), one after the other until the end of the file."""

    def __init__(self, new_frame: Callable[[], Any], *, slice_bytes: int, padding: bytes) -> None:
        self._new_frame = new_frame
        self._slice_bytes = slice_bytes
        self._any = False
        self._padding = padding  # what may stand between and behind frames
        self._frame: Any = None  # None: between frames

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), self._slice_bytes):
            rest = data[start : start + self._slice_bytes]
            while rest:
                if self._frame is None:
                    rest = rest.lstrip(self._padding) if self._padding and self._any else rest
                    if not rest:
                        break
                    self._frame, self._any = self._new_frame(), True
                try:
                    yield self._frame.decompress(rest)
                except (zlib.error, zstandard.ZstdError, MemoryError) as error:
                    if _ZSTD_WINDOW_TOO_LARGE in str(error):
                        raise WindowTooLargeError(limit_bytes=_ZSTD_WINDOW_BYTES) from error
                    message = f"the compressed input is corrupt: {error}"
                    raise CorruptInputError(message) from error
                rest = b""
                if self._frame.eof:
                    rest, self._frame = self._frame.unused_data, None

    def finish(self) -> None:
        if self._frame is not None:
            raise CorruptInputError("the compressed input is cut short")


class Format:
    """A way to store lines, known by its suffix."""

    def __init__(self, suffix: str, decoder: Callable[[], Decoder], encoder: Callable[[], Encoder]) -> None:
        self.suffix = suffix
        self.decoder = decoder
        self.encoder = encoder


PLAIN = Format(".jsonl", _Plain, _Plain)
_FORMATS = (
    PLAIN,
    Format(
        ".jsonl.gz",
        lambda: _Frames(
            lambda: zlib.decompressobj(wbits=_GZIP_WINDOW_BITS), slice_bytes=_GZIP_SLICE_BYTES, padding=b"\0"
        ),
        lambda: zlib.compressobj(wbits=_GZIP_WINDOW_BITS),
    ),
    Format(
        ".jsonl.zst",
        lambda: _Frames(
            lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(),
            slice_bytes=_ZSTD_SLICE_BYTES,
            padding=b"",
        ),
        lambda: zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj(),
    ),
)
SUFFIXES = tuple(known.suffix for known in _FORMATS)


def format_of(name: str) -> Format | None:
    """The format that a file's name says, if it says one."""
    return next((known for known in _FORMATS if name.endswith(known.suffix)), None)
