"""Log lines: whole, careful, and on one line."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from services.common import logs
from services.common.grpc_details import format_status

_log = logging.getLogger("services.test")
_SECRET = "Canary & Co"  # a traceback shows the code that raised, so that has them by a name


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What a test configures, no other test has."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("asyncio").filters.clear()


def _fail() -> None:
    try:
        raise KeyError(_SECRET)  # noqa: TRY301 - to have one to chain
    except KeyError as error:
        raise ValueError(_SECRET + " again") from error


def _log_a_failure() -> None:
    try:
        _fail()
    except ValueError:
        _log.exception("a request failed unexpectedly")


def test_text_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Line ends, escapes and direction marks of a caller's begin no line and paint no terminal."""
    logs.configure(log_format="text", level="info")
    _log.warning("refused: %s", "x\n2026-01-01 INFO fake: all is well\r\x1b[2J\u2028\u202ey")
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert r"x\n2026-01-01 INFO fake: all is well\r\x1b[2J\u2028\u202ey" in err
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exception_is_logged_with_stack_without_text(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Type and stack of an exception and of its cause are logged at info. Texts are logged only at debug."""
    logs.configure(log_format=log_format, level="info")
    _log_a_failure()
    err = capsys.readouterr().err
    assert "Canary" not in err
    assert all(told in err for told in ("ValueError", "KeyError", "test_logs.py", "in _fail"))
    logs.configure(log_format=log_format, level="debug")
    _log_a_failure()
    assert "Canary & Co again" in capsys.readouterr().err


def test_exception_lines_are_indented(capsys: pytest.CaptureFixture[str]) -> None:
    """In text each of its lines is set in, at debug too, whatever is in its words."""
    logs.configure(log_format="text", level="debug")
    try:
        raise ValueError("x\n2026-01-01 INFO fake: all is well")  # noqa: TRY301
    except ValueError:
        _log.exception("failed")
    first, *others = capsys.readouterr().err.splitlines()
    assert "failed" in first
    assert others
    assert all(line.startswith("    ") for line in others)


async def test_failed_task_is_logged_without_exception_text(capsys: pytest.CaptureFixture[str]) -> None:
    """What asyncio says of a failure that nobody looked at has the task in it, and that the exception."""

    async def fail() -> None:
        raise ValueError(_SECRET)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        told.set()

    logs.configure(log_format="json", level="info")
    told = asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(handle)
    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    del task
    await asyncio.wait_for(told.wait(), 30)
    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["message"] == "Task exception was never retrieved"
    assert "ValueError" in line["exc_info"]
    assert "Canary" not in json.dumps(line)


def test_trace_ids_are_added_to_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """While something is traced each line has its ids, as fields or behind the message; else none."""
    logs.set_trace_id_source(lambda: ("0af7", "b7ad"))
    logs.configure(log_format="json", level="info")
    _log.info("hello", extra={"pairs": 3})
    logs.configure(log_format="text", level="info")
    _log.info("hello")
    logs.set_trace_id_source(None)
    _log.info("hello")
    as_json, as_text, without = capsys.readouterr().err.splitlines()
    line = json.loads(as_json)
    assert (line["message"], line["pairs"], line["trace_id"], line["span_id"]) == ("hello", 3, "0af7", "b7ad")
    assert as_text.endswith("hello trace_id=0af7 span_id=b7ad")
    assert without.endswith("hello")


def test_only_details_written_by_grpc_are_logged() -> None:
    """Why nothing could be reached is told; what a server says is not, whatever it begins with."""
    unreachable = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: refused"
    assert format_status("UNAVAILABLE", unreachable) == f"UNAVAILABLE: {unreachable}"
    assert format_status("DEADLINE_EXCEEDED", "Deadline Exceeded") == "DEADLINE_EXCEEDED: Deadline Exceeded"
    for words in ("bad title 'Canary'", "Deadline Exceeded for Canary", "", None):
        assert format_status("UNKNOWN", words) == "UNKNOWN"
    assert len(format_status("UNAVAILABLE", unreachable + "x" * 10_000)) < 400
