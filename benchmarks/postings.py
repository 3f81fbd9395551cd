"""Generate the postings of a day: known pairs by rank (Zipf exponent 1.1 of 20M), and new pairs among them.

`python -m benchmarks.postings FOLDER FILES LINES NEW FIRST KNOWN` writes them in a separate process, because
memory of the benchmark itself would count as memory of its child processes.
"""

import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.store_server import pair

KNOWN = 20_000_000
_EXPONENT = 1.1
_SEED = 1
_FIRST_MINUTE = 1_714_521_600


def ranks(drawn: random.Random, known: int = KNOWN) -> Iterator[int]:
    """Yield ranks from 0 without end, by rejection-inversion (Hörmann, Derflinger 1996) without tables."""
    power = 1 - _EXPONENT

    def integral(x: float) -> float:
        return float((x**power - 1) / power)

    def inverse(y: float) -> float:
        return float((1 + power * y) ** (1 / power))

    low, high = integral(1.5) - 1, integral(known + 0.5)
    near = 2 - inverse(integral(2.5) - 2**-_EXPONENT)
    while True:
        y = high + drawn.random() * (low - high)
        x = inverse(y)
        rank = min(max(1, math.floor(x + 0.5)), known)
        if rank - x <= near or y >= integral(rank + 0.5) - rank**-_EXPONENT:
            yield rank - 1


def posting_line(number: int, rank: int) -> str:
    """Return a posting of about 200 bytes."""
    company, title = pair(rank)
    return (
        f'{{"url": "https://jobs.example.com/posting/{number:012d}", "company": "{company}", '
        f'"title": "{title}", "location": "Berlin, Germany", "posted": "2024-05-01T00:00:00Z", '
        f'"id": {number}}}\n'
    )


def write_files(
    folder: Path, *, files: int, lines: int, new: int, first_new: int = KNOWN, known: int = KNOWN
) -> None:
    """Write `files` files with `lines` lines in total, `new` of them with new pairs, spread evenly."""
    folder.mkdir(parents=True)
    drawn = ranks(random.Random(_SEED), known)
    written = unseen = 0
    for number in range(files):
        with (folder / f"{_FIRST_MINUTE + 60 * number}.jsonl").open("w") as file:
            for _ in range(lines * (number + 1) // files - lines * number // files):
                written += 1
                if unseen < new * written // lines:
                    file.write(posting_line(written, first_new + unseen))
                    unseen += 1
                else:
                    file.write(posting_line(written, next(drawn)))


def generate(
    folder: Path, *, files: int, lines: int, new: int = 0, first_new: int = KNOWN, known: int = KNOWN
) -> None:
    """Write the files in a separate process."""
    numbers = map(str, (files, lines, new, first_new, known))
    subprocess.run([sys.executable, "-m", __name__, str(folder), *numbers], check=True)


if __name__ == "__main__":
    _files, _lines, _new, _first, _known = map(int, sys.argv[2:])
    write_files(Path(sys.argv[1]), files=_files, lines=_lines, new=_new, first_new=_first, known=_known)
