"""A record of every call: the judge in demos and tests.

One JSON line a call, written when the call ends: `at` (unix seconds of its arrival), `queued_seconds`,
`code` (status name), `pairs` ([company, title], in the call's order), `levels` (by the same order; null
where no answer was given).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO


class CallLog:
    """Appends whole lines to a file. Without a file nothing is logged."""

    def __init__(self, path: str | None) -> None:
        self._file: TextIO | None = Path(path).open("a", encoding="utf-8") if path else None  # noqa: SIM115 - open for the process's life

    def write(
        self,
        *,
        at: float,
        queued_seconds: float,
        code: str,
        pairs: Sequence[tuple[str, str]],
        levels: Sequence[int | None],
    ) -> None:
        """Append one call."""
        if self._file is None:
            return
        line = {"at": at, "queued_seconds": queued_seconds, "code": code, "pairs": pairs, "levels": levels}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
