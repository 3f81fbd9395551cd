"""Tests of S3 servers that list keys without an order, and of outputs that no listing has."""

import random
from collections.abc import Iterator

import pytest

from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, RunResult
from tests.support.postings import make_posting
from tests.support.scripted_s3 import ENVIRONMENT, Fault, ScriptedS3, scripted_s3

_FILES = 20


_LINES = [make_posting(id=i) for i in range(5)]


_LARGE_LINES = [make_posting(id=i, text="x" * 1_000) for i in range(6_000)]


def _expected(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3() -> Iterator[ScriptedS3]:
    """Start a server with plain HTTP."""
    with scripted_s3() as server:
        yield server


def _run(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, *args: object, by_flag: bool = True
) -> RunResult:
    endpoint = ("--endpoint-url", s3.url) if by_flag else ()
    return augment(
        f"s3://{s3.bucket}/in/", f"s3://{s3.bucket}/out/", "--target", stub.target, *endpoint, *args
    )


def _shuffled(keys: list[str]) -> list[str]:
    return random.Random(7).sample(keys, len(keys))


def _sort_within_pages(keys: list[str]) -> list[str]:
    """Sort the keys within each page of five, but not between pages."""
    return [key for start in range(4) for key in sorted(keys)[start::4]]


@pytest.mark.parametrize("order", [_shuffled, pytest.param(_sort_within_pages, marks=pytest.mark.slow)])
def test_unordered_listing_is_logged_and_no_file_is_processed_twice(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, order: object
) -> None:
    """With unordered listings, a run logs one warning, skips done files and redoes changed ones."""
    s3.sort_keys = order  # type: ignore[assignment]
    s3.page_size = 5
    for i in range(_FILES):
        s3.put(f"in/{i:02}.jsonl", _LINES[0])
    assert f"{_FILES} done, 0 skipped, 0 failed" in _run(augment, stub, s3).stdout
    for stored in s3.objects.values():
        stored.modified -= 3600
    put_count = s3.count_requests("PutObject")
    second = _run(augment, stub, s3)
    assert (second.exit_code, f"0 done, {_FILES} skipped, 0 failed" in second.stdout) == (0, True)
    assert second.stderr.count("lists objects without an order") == second.stderr.count("\n") == 1
    # Those of the first page, before the disorder shows.
    assert s3.count_requests("PutObject") <= put_count + 5
    redone = _run(augment, stub, s3, "--overwrite")
    assert (redone.exit_code, f"{_FILES} done, 0 skipped, 0 failed" in redone.stdout) == (0, True)
    for stored in s3.objects.values():
        stored.modified -= 3600
    for i in range(_FILES // 2):
        s3.put(f"in/{i:02}.jsonl", _LINES[1])
    changed = _run(augment, stub, s3)
    assert (changed.exit_code, f"{_FILES // 2} done, {_FILES // 2} skipped, 0 failed" in changed.stdout) == (
        0,
        True,
    )
    assert all(s3.objects[f"out/{i:02}.jsonl"].data == _expected(_LINES[1:2]) for i in range(_FILES // 2))


def test_new_output_of_another_process_is_a_conflict(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """An output that appeared during the run belongs to another process, and the file fails."""
    s3.put("in/a.jsonl", _LINES[0])
    s3.put("out/a.jsonl", b"of another process")
    s3.sort_keys = lambda keys: [key for key in sorted(keys) if not key.startswith("out/")]
    result = _run(augment, stub, s3)
    assert result.exit_code == 1
    assert "another process is writing the same output" in result.stderr
    assert s3.objects["out/a.jsonl"].data == b"of another process"


@pytest.mark.parametrize("lines", [_LINES, _LARGE_LINES])
def test_older_output_that_is_not_listed_is_replaced(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, lines: list[bytes]
) -> None:
    """An output that is older than the run and has another input is replaced, even if no listing has it."""
    s3.put("in/a.jsonl", b"\n".join(lines))
    s3.put("out/a.jsonl", b"of an older input", age_seconds=3600)
    s3.sort_keys = lambda keys: [key for key in sorted(keys) if not key.startswith("out/")]
    result = _run(augment, stub, s3)
    assert (result.exit_code, result.stderr) == (0, "")
    assert s3.objects["out/a.jsonl"].data == _expected(lines)


def test_output_that_cannot_be_checked_fails_its_file_only(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """If one output cannot be checked, its file fails, and all others are processed."""
    for i in range(_FILES):
        s3.put(f"in/{i:02}.jsonl", _LINES[0])
    assert _run(augment, stub, s3).exit_code == 0
    for i in range(_FILES):
        s3.put(f"in/{i:02}.jsonl", _LINES[1])
    s3.faults = [Fault("HeadObject", "403", key="out/07")]
    result = _run(augment, stub, s3)
    assert (result.exit_code, f"{_FILES - 1} done, 0 skipped, 1 failed" in result.stdout) == (1, True)
    assert result.stderr == "augmenter: s3://b/in/07.jsonl: s3://b/out/07.jsonl: access denied\n"
