"""Sample postings: minute-files named by unix time, skewed repeats, some Unicode, a few bad lines."""

import gzip
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import zstandard

# The stub rejects a batch in which a title contains this.
POISON = "Poison Taster"
_FIRST_MINUTE = 1_714_605_540
_SUFFIXES = (".jsonl", ".jsonl", ".jsonl.gz", ".jsonl", ".jsonl.zst")
_ZIPF_EXPONENT = 1.1

_COMPANY_FIRST = (
    "Acme",
    "Nordlicht",
    "Blue Harbor",
    "Café Müller",
    "東京データ",
    "Ørsted & Søn",
    "Quantum Fox",
    "Złoty Młyn",
    "Pioneer",
    "Sunny Side",
    "Vega",
    "Iron Oak",
    "L'Atelier",
    "Маяк",
    "Redwood",
    "Silver Birch",
    "Polaris",
    "Granite",
    "Kestrel",
    "Lumen",
)
_COMPANY_LAST = ("Inc", "GmbH", "Labs", "Systems", "Health", "Logistics", "Bank", "Foods", "Energy", "AI")
_GRADES = (
    "Junior",
    "",
    "Senior",
    "Lead",
    "Principal",
    "Staff",
    "Graduate",
    "Head of",
    "Director of",
    "Intern",
    "Chief",
)
_JOBS = (
    "Software Engineer",
    "Data Scientist",
    "Account Manager",
    "Nurse",
    "Électricien",
    "Product Designer",
    "Köchin",
    "Sales Representative",
    "Финансовый аналитик",
    "Warehouse Operator",
    "教師",
    "Mechanical Engineer",
    "Marketing Specialist",
    "Security Officer",
    "Chemist & Lab Manager",
)
_PLACES = ("Berlin", "São Paulo", "San Jose, CA", "Remote", "Łódź", "札幌", "Austin, TX", "Malmö")

_BAD_LINES = (
    b'{"company": "Acme Inc", "title": "Cut off in the mid',
    b'{"company": "Acme Inc"}',
    b'{"company": "Acme Inc", "title": null}',
    b'["Acme Inc", "Nurse"]',
    b'{"company": "Acme \xff Inc", "title": "Nurse"}',
    b"",
)


def write_postings(folder: Path, *, files: int, lines_per_file: int, distinct_pairs: int, seed: int) -> None:
    """Write `files` minute-files; pairs are drawn by rank, the weight of rank r being r^-1.1."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    pairs = _pairs(distinct_pairs, chance)
    cumulative = list(itertools.accumulate((rank + 1) ** -_ZIPF_EXPONENT for rank in range(len(pairs))))
    folder.mkdir(parents=True)
    for number in range(files):
        minute = _FIRST_MINUTE + 60 * number
        drawn = chance.choices(pairs, cum_weights=cumulative, k=lines_per_file)
        lines = [_posting(company, title, minute, chance) for company, title in drawn]
        lines.insert(chance.randrange(len(lines)), _BAD_LINES[number % len(_BAD_LINES)])
        if number % 3 == 1:
            lines.insert(chance.randrange(len(lines)), _posting("Acme Inc", POISON, minute, chance))
        content = b"\n".join(lines) + b"\n"
        suffix = _SUFFIXES[number % len(_SUFFIXES)]
        if suffix.endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        elif suffix.endswith(".zst"):
            content = zstandard.compress(content)
        (folder / f"{minute}{suffix}").write_bytes(content)


def read_lines(path: Path) -> list[bytes]:
    """Return the lines of a file in any format."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    elif path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True).read()
    return content.split(b"\n")[:-1]


def _pairs(count: int, chance: random.Random) -> list[tuple[str, str]]:
    companies = [f"{first} {last}" for first in _COMPANY_FIRST for last in _COMPANY_LAST]
    titles = [f"{grade} {job}".strip() for grade in _GRADES for job in _JOBS]
    return chance.sample(list(itertools.product(companies, titles)), count)


def _posting(company: str, title: str, minute: int, chance: random.Random) -> bytes:
    posting = {
        "url": f"https://jobs.example.com/{chance.getrandbits(64):016x}/apply",
        "company": _respell(company, chance),
        "title": _respell(title, chance),
        "location": chance.choice(_PLACES),
        "scraped_on": minute + chance.randrange(60),
    }
    return json.dumps(posting, ensure_ascii=chance.random() < 0.5).encode()  # noqa: PLR2004 - one in two


def _respell(text: str, chance: random.Random) -> str:
    """Return the text, sometimes in another spelling of the same pair, as another scraper would have it."""
    draw = chance.random()
    if draw < 0.03:  # noqa: PLR2004
        return text.upper()
    return f" {text.replace(' ', '  ')}" if draw < 0.05 else text  # noqa: PLR2004


def parse_pairs(lines: list[bytes]) -> Iterator[tuple[str, str, int]]:
    """Yield company, title and level of augmented lines."""
    for line in lines:
        posting = json.loads(line)
        yield posting["company"], posting["title"], posting["seniority"]
