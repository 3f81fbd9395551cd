"""Run the augmenter and the servers that it needs as processes, and measure what the runs use."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import peak_bytes
from demo.processes import Server, environment, running_server

SCALE = float(os.environ.get("BENCH_SCALE", "1"))
"""Share of the lines that are generated: 1 for a measurement, less to check that a benchmark works."""
_POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run used: `seconds` from its own summary, the rest from the operating system."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    summary: Mapping[str, Any]


class AugmenterProcess:
    """A running augmenter."""

    def __init__(self, *args: str, env: dict[str, str] | None = None) -> None:
        self._summary = Path(tempfile.mkstemp(suffix=".json")[1])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.augmenter", "run", *args, "--summary-json", str(self._summary)],
            stdout=subprocess.DEVNULL,
            env=environment() | (env or {}),
        )

    def wait(self) -> RunResult:
        """Wait for the end of the run. Raises RuntimeError if it failed."""
        peak = 0
        while True:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                break
            try:
                peak = max(peak, peak_bytes(self._process.pid))
            except (FileNotFoundError, StopIteration):
                # The process is just ending.
                continue
            time.sleep(_POLL_SECONDS)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            message = f"augmenter run ended with {self._process.returncode}"
            raise RuntimeError(message)
        summary = json.loads(self._summary.read_text())
        self._summary.unlink()
        return RunResult(
            seconds=summary["seconds"],
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_mib=peak / 2**20,
            summary=summary,
        )


def run(*args: str, env: dict[str, str] | None = None) -> RunResult:
    """Run the augmenter to its end."""
    return AugmenterProcess(*args, env=env).wait()


def start_cpu_seconds(folder: Path) -> float:
    """Return the processor time of a run that finds no file."""
    (folder / "none").mkdir()
    return run(
        str(folder / "none"), str(folder / "nothing"), "--ok-empty", "--target", "127.0.0.1:1"
    ).cpu_seconds


@contextmanager
def proxy_and_model(
    work: Path, *, latency: str = "0s", limited: bool = False, cache_url: str = "memory:"
) -> Iterator[tuple[Server, Server]]:
    """Start a model stub and a proxy in front of it."""
    with ExitStack() as stack:
        stub_args = ["serve", "--listen", "127.0.0.1:0", "--rate", "0", "--latency", latency]
        stub_args += ["--log", str(work / "calls.jsonl")] if limited else []
        stub = stack.enter_context(running_server("services.model_stub", stub_args, log=work / "stub.log"))
        args = ["serve", "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--drain-delay", "0s"]
        args += ["--model-target", stub.target, "--cache-url", cache_url]
        args += [] if limited else ["--model-rate", "100000000", "--model-calls-per-second", "0"]
        yield stack.enter_context(running_server("services.cache_proxy", args, log=work / "proxy.log")), stub


def metric_sums(http: str, sample_name: str, *, label: str) -> dict[str, float]:
    """Return the samples of a metric by one of their labels."""
    with urlopen(f"http://{http}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        sample.labels.get(label, ""): sample.value
        for family in families
        for sample in family.samples
        if sample.name == sample_name
    }
