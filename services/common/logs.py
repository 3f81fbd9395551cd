"""Logs on standard error (JSON or text), and the one `ready` line on standard output."""

import json
import logging
import sys
from typing import Any

from pythonjsonlogger.json import JsonFormatter


def configure(*, log_format: str, level: str) -> None:
    """Send the process's logs to standard error as `json` or `text`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
        if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # These speak of their own requests at info and debug; ours are the ones an operator reads.
    for name in ("aiohttp.access", "asyncio", "botocore", "aiobotocore", "grpc"):
        logging.getLogger(name).setLevel(logging.WARNING)


def announce_ready(**fields: Any) -> None:
    """Print the line that says where a server can be reached, now that it answers."""
    sys.stdout.write(json.dumps({"event": "ready", **fields}) + "\n")
    sys.stdout.flush()
