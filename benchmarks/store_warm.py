"""Pairs per second that `cache-proxy warm` writes to an empty cache, all distinct."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.report import Figure, show
from benchmarks.store_server import pair, redis_process

_WORK = Path(".bench/store_warm")
_PAIRS = 1_000_000
_ROUNDS = 3
_MIN_PAIRS_PER_SECOND = 100_000


def main() -> None:
    """Measure, print the table and write the JSON file."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    path = _WORK / "augmented.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for rank in range(_PAIRS):
            file.write(json.dumps(_posting(rank)) + "\n")
    rates = []
    for number in range(_ROUNDS):
        with redis_process(_WORK / str(number)) as store:
            ended = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "services.cache_proxy",
                    "warm",
                    "--cache-url",
                    store.url,
                    "--json",
                    str(path),
                ],
                capture_output=True,
                check=True,
                env=os.environ,
            )
        rates.append(_PAIRS / float(json.loads(ended.stdout)["seconds"]))
    rate = median(rates)
    warm = Figure(
        what="warm, pairs/s",
        measured=f"{rate:,.0f}",
        beside=f"{_MIN_PAIRS_PER_SECOND:,}",
        ratio=rate / _MIN_PAIRS_PER_SECOND,
        target=1,
    )
    show("store_warm", [warm])


def _posting(rank: int) -> dict[str, object]:
    company, title = pair(rank)
    return {
        "url": f"https://jobs.example.com/{rank}",
        "company": company,
        "title": title,
        "location": "Springfield",
        "scraped_on": 1714605534,
        "seniority": rank % 7 + 1,
    }


if __name__ == "__main__":
    main()
