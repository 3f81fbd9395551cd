"""The command as a process, which a test may signal and kill."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, clean_environment


@contextmanager
def augmenter_process(*args: object, env: dict[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """`augmenter run`, killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.augmenter", "run", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)} | (env or {}),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_summary(path: Path) -> dict[str, Any]:
    """What `--summary-json` wrote."""
    read: dict[str, Any] = json.loads(path.read_text())
    return read
