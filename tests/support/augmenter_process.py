"""The augmenter as a process, which a test can signal and kill."""

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
    """Run `augmenter run`. It is killed at the end of the block if it is still running."""
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
    """Read the file that `--summary-json` wrote."""
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary
