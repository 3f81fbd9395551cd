"""File formats by name, and their streaming codecs with bounded memory.

Compressed input is decompressed in small slices, because the output of one slice is held in memory as a
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
# zlib's value for "gzip, with header and checksum".
_GZIP_WINDOW_BITS: Final = 31
_ZSTD_LEVEL = 3
# Each file in progress holds a window. RFC 8878 recommends this size to readers; only `--long` and `--ultra`
# produce larger windows.
MAX_ZSTD_WINDOW_BYTES = 8 * 2**20
# Part of zstd's message; the error has no code.
_ZSTD_WINDOW_ERROR = "requires too much memory"
_BASE_SUFFIXES = (".jsonl", ".ndjson", ".jl", ".json")


class Decoder(Protocol):
    """Decodes the bytes of a file."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes."""

    def finish(self) -> Iterator[bytes]:
        """Decode the last bytes. Raises CorruptInputError if the file is incomplete."""


class Encoder(Protocol):
    """Encodes text into the bytes of a file. `flush` returns the last ones."""

    def compress(self, data: bytes, /) -> bytes:
        """Encode the next bytes."""

    def flush(self) -> bytes:
        """Return the last bytes of the file."""


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
    """Decodes consecutive compressed frames (gzip members, zstd frames)."""

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
        # Bytes that may stand between and behind frames.
        self._padding = padding
        self._has_frames = False
        # None between two frames.
        self._frame: Any = None
        # Bytes that are too few to decide whether another frame begins.
        self._pending = b""

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
        """Return the first bytes of the next frame, or none while they are too few to decide."""
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
    """A file format with its suffix. `compression` is its name, empty for plain text."""

    suffix: str
    compression: str = ""
    magics: tuple[bytes, ...] = ()

    @property
    def suffix_help(self) -> str:
        """Return the suffixes of its file names, for messages."""
        return ", ".join(base + self.suffix for base in _BASE_SUFFIXES)

    def matches(self, data: bytes) -> bool:
        """Return whether the bytes are the beginning of this format."""
        return data.startswith(self.magics)

    def may_match(self, data: bytes) -> bool:
        """Return whether more bytes are needed to decide."""
        return any(len(data) < len(magic) and magic.startswith(data) for magic in self.magics)

    def decoder(self, *, max_zstd_window_bytes: int = MAX_ZSTD_WINDOW_BYTES) -> Decoder:
        """Return a decoder that accepts only this format."""
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
# The last sixteen are the magic numbers of skippable frames, which hold no text.
ZSTD = Format(
    ".zst",
    "zstd",
    (b"\x28\xb5\x2f\xfd", *(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))),
)
FORMATS = (PLAIN, GZIP, ZSTD)
SUFFIXES = tuple(base + known.suffix for base in _BASE_SUFFIXES for known in FORMATS)
SUFFIX_HELP = f"{', '.join(_BASE_SUFFIXES)}, each also with {GZIP.suffix} or {ZSTD.suffix}, in any case"
"""The suffixes of input files, for messages."""


def format_for_name(name: str) -> Format | None:
    """Return the format that the suffix of a name denotes, or None."""
    lower = name.lower()
    for known in FORMATS:
        if lower.endswith(known.suffix) and lower.removesuffix(known.suffix).endswith(_BASE_SUFFIXES):
            return known
    return None
