"""A real Prometheus that scrapes the services of a test and evaluates its rules once a second."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.support.redis_server import free_port, wait_for

_SCRAPE_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One series in the result of a query."""

    labels: Mapping[str, str]
    value: float


class PrometheusServer:
    """A client of Prometheus's HTTP API."""

    def __init__(self, url: str, *, targets: int) -> None:
        self._url = url
        self._targets = targets

    def query(self, expr: str, *, unix_seconds: float) -> list[Sample]:
        """Return the result of an expression at a time."""
        result = self._get("query", query=expr, time=str(unix_seconds))["result"]
        return [Sample(one["metric"], float(one["value"][1])) for one in result]

    def query_value(self, expr: str, *, unix_seconds: float) -> float:
        """Return the value of an expression whose result is a single series."""
        [sample] = self.query(expr, unix_seconds=unix_seconds)
        return sample.value

    def firing_alerts(self) -> set[str]:
        """Return the names of the firing alerts."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def wait_scraped(self, *, since: float) -> None:
        """Wait until each target has been scraped after this time (unix seconds)."""
        wait_for(lambda: self._all_targets_scraped(since), description="every target is scraped")

    def _all_targets_scraped(self, since: float) -> bool:
        # Until it has read its configuration, Prometheus reports no targets at all.
        targets = self._get("targets", state="active")["activeTargets"]
        return len(targets) == self._targets and all(
            target["health"] == "up" and datetime.fromisoformat(target["lastScrape"]).timestamp() > since
            for target in targets
        )

    def _get(self, endpoint: str, **parameters: str) -> Any:
        with urlopen(f"{self._url}/api/v1/{endpoint}?{urlencode(parameters)}", timeout=10) as response:
            return json.load(response)["data"]


@contextmanager
def prometheus_server(
    folder: Path, jobs: Mapping[str, Sequence[str]], *, rules: Path
) -> Iterator[PrometheusServer]:
    """Run a Prometheus that scrapes these addresses (`host:port`) by job.

    Skip the test if Prometheus is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus is installed")
    interval = f"{_SCRAPE_SECONDS}s"
    config = folder / "prometheus.yml"
    # JSON is YAML, too.
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": interval, "evaluation_interval": interval},
                "rule_files": [str(rules)],
                "scrape_configs": [
                    {"job_name": job, "static_configs": [{"targets": list(targets)}]}
                    for job, targets in jobs.items()
                ],
            }
        )
    )
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        server = PrometheusServer(f"http://127.0.0.1:{port}", targets=sum(map(len, jobs.values())))
        wait_for(lambda: _is_ready(f"http://127.0.0.1:{port}/-/ready"), description="Prometheus is ready")
        server.wait_scraped(since=time.time())
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        with urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except URLError:
        return False
