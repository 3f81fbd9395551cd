"""The committed cases, and mutations of them by hypothesis."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

_FOLDER = Path(__file__).parent / "corpus"
# They take a few seconds.
_LONG_RUN_EXAMPLES = 500
_MAX_BYTES = 8192

Check = Callable[[bytes], None]


@cache
def load_cases(kind: str) -> dict[str, bytes]:
    """Return the cases of a kind by file name."""
    return {path.name: path.read_bytes() for path in sorted((_FOLDER / kind).iterdir())}


def replay_cases(kind: str) -> pytest.MarkDecorator:
    """Return a mark that runs a test once for each case, in its argument `case`."""
    found = load_cases(kind)
    return pytest.mark.parametrize("case", found.values(), ids=found.keys())


def mutate_cases(kind: str) -> st.SearchStrategy[bytes]:
    """Return a strategy of cases that are cut, doubled, overwritten or mixed with another in a few places."""
    whole = st.sampled_from(list(load_cases(kind).values()))
    place, size = st.integers(0, _MAX_BYTES), st.integers(0, 12)
    splinter = st.one_of(
        st.binary(max_size=4),
        st.sampled_from([b"\x80", b"\xff", b"\0", b"\n", b"{", b'"', b"\\", b"}", b",", b'"seniority":']),
        st.builds(lambda case, at, length: case[at % (len(case) + 1) :][:length], whole, place, size),
    )
    edits = st.lists(st.tuples(place, size, splinter), max_size=4)
    return st.builds(_apply_edits, whole, edits).map(lambda case: case[:_MAX_BYTES])


def _apply_edits(case: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, size, splinter in edits:
        at = place % (len(case) + 1)
        case = case[:at] + splinter + case[at + size :]
    return case


def fuzz_for_long(kind: str, check: Check) -> None:
    """Check hundreds of mutated cases, different ones in every run."""

    @settings(max_examples=_LONG_RUN_EXAMPLES, database=None, phases=[Phase.generate, Phase.shrink])
    @given(mutate_cases(kind))
    def fuzz(case: bytes) -> None:
        check(case)

    fuzz()
