"""Logs on standard error (JSON or text), and the one `ready` line on standard output.

Above debug, a line never holds data of a caller, the model or a file. So an unexpected exception is logged
with its type and its stack, but without its text, which may quote a company or a title. In text format a
message is always one line.
"""

import json
import logging
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeAlias

from pythonjsonlogger.json import JsonFormatter

from services.common.printable import escape_unprintable

_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_TRACE_FIELDS = ("trace_id", "span_id")
_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)
_CALLER_ERRORS = {"ExecuteBatchError", "HttpProcessingError", "RequestPayloadError"}
# gRPC's message, which quotes the metadata: a token, or text of the model.
_INVALID_METADATA = "Invalid encoding on %s"


def configure(*, log_format: str, level: str) -> None:
    """Send the process's logs to standard error as `json` or `text`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_drop_caller_noise)
    handler.setFormatter(
        _JsonLogFormatter(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
        if log_format == "json"
        else _TextLogFormatter(_TEXT_FORMAT)
    )
    handler.addFilter(_add_trace_ids)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # These speak of their own requests at info and debug; ours are the ones an operator reads.
    for name in ("aiohttp.access", "asyncio", "botocore", "aiobotocore", "grpc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("asyncio").addFilter(_keep_first_line)


def set_trace_id_source(ids: Callable[[], tuple[str, str] | None] | None) -> None:
    """Add the current trace id and span id to every line, or stop adding them if `ids` is None."""
    _trace_id_sources.clear()
    if ids is not None:
        _trace_id_sources.append(ids)


_trace_id_sources: list[Callable[[], tuple[str, str] | None]] = []
"""The source of the ids, at most one. Set when tracing starts, cleared when it ends."""


def announce_ready(**fields: Any) -> None:
    """Print the `ready` line with the addresses of a server that accepts requests."""
    sys.stdout.write(json.dumps({"event": "ready", **fields}) + "\n")
    sys.stdout.flush()


def _debug_enabled() -> bool:
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def _drop_caller_noise(record: logging.LogRecord) -> bool:
    """Return false for errors that callers cause in their own requests, which libraries log with a traceback.

    These are cancelled RPCs, invalid messages and metadata (gRPC), and invalid HTTP requests (aiohttp).
    Otherwise callers could flood the log.
    """
    kind = record.exc_info[0] if record.exc_info else None
    if kind is None:
        return True
    if record.name.startswith("grpc.") and (
        record.msg == _INVALID_METADATA or kind.__name__ == "DecodeError"
    ):
        return False
    return not any(base.__name__ in _CALLER_ERRORS for base in kind.__mro__)


def _add_trace_ids(record: logging.LogRecord) -> bool:
    for ids in _trace_id_sources:
        if found := ids():
            record.trace_id, record.span_id = found
    return True


def _keep_first_line(record: logging.LogRecord) -> bool:
    """Keep the first line of asyncio's message about a failed task: the others quote the exception."""
    if not _debug_enabled():
        record.msg, record.args = record.getMessage().split("\n", 1)[0], ()
    return True


def _format_trace(error: BaseException | None) -> str:
    """Return the stack and the type of an exception and of its causes, without their texts."""
    lines: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lines += [*traceback.format_tb(error.__traceback__), f"{type(error).__qualname__}\n"]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(lines).rstrip("\n")


class _JsonLogFormatter(JsonFormatter):
    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - logging's name
        """The exception's places."""
        return logging.Formatter.formatException(self, ei) if _debug_enabled() else _format_trace(ei[1])


class _TextLogFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The message on one line, and the ids behind it."""
        record.message = escape_unprintable(record.message)
        ids = "".join(f" {name}={getattr(record, name)}" for name in _TRACE_FIELDS if hasattr(record, name))
        return super().formatMessage(record) + ids

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - logging's name
        """The exception's places, each line set in, so that none looks like a message."""
        text = super().formatException(ei) if _debug_enabled() else _format_trace(ei[1])
        return "\n".join(f"    {escape_unprintable(line)}" for line in text.splitlines())
