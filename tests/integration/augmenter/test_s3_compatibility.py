"""S3 servers that are not AWS's: their checksums, their order, how they are addressed."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, RunResult
from tests.support.certificates import CertificateAuthority
from tests.support.postings import make_posting
from tests.support.scripted_s3 import ENVIRONMENT, Fault, ScriptedS3, scripted_s3

_MARK = "x-amz-meta-input-etag"
_FILES = 20
_LINES = [make_posting(id=i) for i in range(5)]
_TEXT = b"\n".join(_LINES)
_LARGE_LINES = [make_posting(id=i, text="x" * 1_000) for i in range(6_000)]
_LARGE = b"\n".join(_LARGE_LINES)


def _expected(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3() -> Iterator[ScriptedS3]:
    """A server by http."""
    with scripted_s3() as server:
        yield server


@pytest.fixture
def https_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedS3]:
    """A server by https, whose CA is in the environment."""
    authority = CertificateAuthority(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.certificate))
    with scripted_s3(authority.sign("server")) as server:
        yield server


def _run(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, *args: object, by_flag: bool = True
) -> RunResult:
    endpoint = ("--endpoint-url", s3.url) if by_flag else ()
    return augment(
        f"s3://{s3.bucket}/in/", f"s3://{s3.bucket}/out/", "--target", stub.target, *endpoint, *args
    )


def _profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    path = tmp_path / "config"
    path.write_text("\n".join(["[default]", *lines, ""]))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(path))


@pytest.mark.parametrize("where", ["flag", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "profile"])
def test_server_that_keeps_aws_chunked_framing_gets_plain_bodies(
    augment: RunAugmenter,
    stub: RunningStub,
    https_s3: ScriptedS3,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By https, wherever the endpoint is set: outputs and rejects hold lines, no framing of the transfer."""
    https_s3.stores_framing = True
    https_s3.put("in/a.jsonl", _TEXT + b"\nbad")
    if where == "profile":
        _profile(tmp_path, monkeypatch, f"endpoint_url = {https_s3.url}")
    elif where != "flag":
        monkeypatch.setenv(where, https_s3.url)
    ended = _run(augment, stub, https_s3, "--ok-rejects", by_flag=where == "flag")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert https_s3.objects["out/a.jsonl"].data == _expected(_LINES)
    assert https_s3.objects["out/_rejects/a.jsonl"].data == b"bad\n"
    assert not any("x-amz-sdk-checksum-algorithm" in call.headers for call in https_s3.requests)


def test_server_that_refuses_checksum_headers_gets_none(
    augment: RunAugmenter, stub: RunningStub, https_s3: ScriptedS3
) -> None:
    """Also not with the parts of a large output."""
    https_s3.refuses_checksums = True
    https_s3.put("in/a.jsonl", _LARGE)
    ended = _run(augment, stub, https_s3)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert https_s3.objects["out/a.jsonl"].data == _expected(_LARGE_LINES)


@pytest.mark.parametrize("where", ["environment", "profile"])
def test_checksums_that_are_asked_for_are_sent_and_declared(
    augment: RunAugmenter,
    stub: RunningStub,
    https_s3: ScriptedS3,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As to AWS: each body has its checksum, and a multipart upload declares which kind its parts have."""
    https_s3.wants_declared_checksums = True
    https_s3.put("in/a.jsonl", _LARGE)
    https_s3.put("in/b.jsonl", _TEXT)
    if where == "profile":
        _profile(tmp_path, monkeypatch, "request_checksum_calculation = when_supported")
    else:
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert _run(augment, stub, https_s3).exit_code == 0
    assert https_s3.objects["out/a.jsonl"].data == _expected(_LARGE_LINES)
    assert https_s3.objects["out/b.jsonl"].data == _expected(_LINES)
    declared = [call.headers for call in https_s3.requests if call.operation == "CreateMultipartUpload"]
    assert [headers["x-amz-checksum-algorithm"] for headers in declared] == ["CRC32"]
    parts = [call.headers for call in https_s3.requests if call.operation == "UploadPart"]
    assert [headers["x-amz-trailer"] for headers in parts] == ["x-amz-checksum-crc32"] * len(parts)


def test_object_whose_checksum_is_wrong_fails_in_one_line(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """Corruption is named as such, at once; nothing is written, and no byte behind the last is requested."""
    s3.sends_checksums = s3.wrong_checksums = True
    s3.put("in/a.jsonl", _TEXT)
    ended = _run(augment, stub, s3)
    assert ended.exit_code == 1
    assert ended.stderr.startswith("augmenter: s3://b/in/a.jsonl: checksum mismatch: Expected checksum ")
    assert ended.stderr.count("\n") == ended.stderr.count("s3://") == 1
    assert s3.keys("out/") == []
    assert (s3.count_requests("GetObject"), s3.count_requests("GetObject (range)")) == (1, 0)


@pytest.mark.parametrize("text", [_TEXT, b""])
def test_reset_behind_the_last_byte_is_the_end(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, text: bytes
) -> None:
    """A connection that is reset when all bytes are there, even if they are none, costs nothing."""
    s3.sends_checksums = True
    s3.faults = [Fault("GetObject", "end")]
    s3.put("in/a.jsonl", text)
    ended = _run(augment, stub, s3)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert s3.objects["out/a.jsonl"].data == (_expected(_LINES) if text else b"")
    assert (s3.count_requests("GetObject"), s3.count_requests("GetObject (range)")) == (1, 0)


def test_corruption_in_front_of_a_late_reset_is_found(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """The client never sees the end of such a stream; the checksum is compared all the same."""
    s3.sends_checksums = s3.wrong_checksums = True
    s3.faults = [Fault("GetObject", "end")]
    s3.put("in/a.jsonl", _TEXT)
    ended = _run(augment, stub, s3)
    assert (ended.exit_code, "checksum mismatch" in ended.stderr) == (1, True)
    assert s3.keys("out/") == []


@pytest.mark.parametrize(
    ("wrong", "ignores_ranges", "checksum"),
    [
        (False, False, ""),
        (False, True, ""),
        (True, False, ""),
        (True, True, ""),
        (False, False, "sha256"),
        (True, False, "sha256"),
        (True, False, "sha1"),
    ],
)
def test_download_is_resumed_where_ranges_carry_the_whole_objects_checksum(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, wrong: bool, ignores_ranges: bool, checksum: str
) -> None:
    """Every byte arrives once, also from a server that sends all of them again, and the whole is checked."""
    s3.sends_checksums = s3.sends_checksums_with_ranges = True
    s3.wrong_checksums = wrong
    s3.ignores_ranges = ignores_ranges
    s3.checksum = checksum
    s3.faults = [Fault("GetObject", "cut"), Fault("GetObject (range)", "cut", times=1)]
    lines = [make_posting(id=i, text=random.Random(i).randbytes(100).hex()) for i in range(2_000)]
    s3.put("in/a.jsonl", b"\n".join(lines))
    ended = _run(augment, stub, s3)
    if wrong:
        assert (ended.exit_code, "checksum mismatch" in ended.stderr) == (1, True)
        assert s3.keys("out/") == []
    else:
        assert (ended.exit_code, ended.stderr) == (0, "")
        assert s3.objects["out/a.jsonl"].data == _expected(lines)
    ranges = [call.headers for call in s3.requests if call.operation == "GetObject (range)"]
    assert len(ranges) == 2
    assert not any("x-amz-checksum-mode" in headers for headers in ranges)


def _shuffled(keys: list[str]) -> list[str]:
    return random.Random(7).sample(keys, len(keys))


def _hide_some_keys(keys: list[str]) -> list[str]:
    """In order within each page of five, but not between pages."""
    return [key for start in range(4) for key in sorted(keys)[start::4]]


@pytest.mark.parametrize("order", [_shuffled, pytest.param(_hide_some_keys, marks=pytest.mark.slow)])
def test_listing_without_an_order_is_noticed_and_nothing_is_done_twice(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, order: object
) -> None:
    """A second run skips what is done, --overwrite redoes it, a changed input is done again; one warning."""
    s3.sort_keys = order  # type: ignore[assignment]
    s3.page_size = 5
    for i in range(_FILES):
        s3.put(f"in/{i:02}.jsonl", _LINES[0])
    assert f"{_FILES} done, 0 skipped, 0 failed" in _run(augment, stub, s3).stdout
    for made in s3.objects.values():
        made.modified -= 3600
    puts = s3.count_requests("PutObject")
    again = _run(augment, stub, s3)
    assert (again.exit_code, f"0 done, {_FILES} skipped, 0 failed" in again.stdout) == (0, True)
    assert again.stderr.count("lists objects without an order") == again.stderr.count("\n") == 1
    assert s3.count_requests("PutObject") <= puts + 5  # those of the page before the disorder shows
    redone = _run(augment, stub, s3, "--overwrite")
    assert (redone.exit_code, f"{_FILES} done, 0 skipped, 0 failed" in redone.stdout) == (0, True)
    for made in s3.objects.values():
        made.modified -= 3600
    for i in range(_FILES // 2):
        s3.put(f"in/{i:02}.jsonl", _LINES[1])
    changed = _run(augment, stub, s3)
    assert (changed.exit_code, f"{_FILES // 2} done, {_FILES // 2} skipped, 0 failed" in changed.stdout) == (
        0,
        True,
    )
    assert all(s3.objects[f"out/{i:02}.jsonl"].data == _expected(_LINES[1:2]) for i in range(_FILES // 2))


def test_output_of_another_process_is_still_respected(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """An output that appeared during the run and that no listing had is another process's: the file fails."""
    s3.put("in/a.jsonl", _LINES[0])
    s3.put("out/a.jsonl", b"of somebody else")
    s3.sort_keys = lambda keys: [key for key in sorted(keys) if not key.startswith("out/")]
    ended = _run(augment, stub, s3)
    assert ended.exit_code == 1
    assert "another process is writing the same output" in ended.stderr
    assert s3.objects["out/a.jsonl"].data == b"of somebody else"


@pytest.mark.parametrize("lines", [_LINES, _LARGE_LINES])
def test_output_that_only_the_listing_lacks_is_replaced(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, lines: list[bytes]
) -> None:
    """An output that is older than the run, and of another input, is nobody's work in progress."""
    s3.put("in/a.jsonl", b"\n".join(lines))
    s3.put("out/a.jsonl", b"of an older input", age_seconds=3600)
    s3.sort_keys = lambda keys: [key for key in sorted(keys) if not key.startswith("out/")]
    ended = _run(augment, stub, s3)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert s3.objects["out/a.jsonl"].data == _expected(lines)


def test_one_output_that_cannot_be_looked_at_fails_alone(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """403 for one of many outputs: that file fails, named once; all others are seen and done."""
    for i in range(_FILES):
        s3.put(f"in/{i:02}.jsonl", _LINES[0])
    assert _run(augment, stub, s3).exit_code == 0
    for i in range(_FILES):
        s3.put(f"in/{i:02}.jsonl", _LINES[1])
    s3.faults = [Fault("HeadObject", "403", key="out/07")]
    ended = _run(augment, stub, s3)
    assert (ended.exit_code, f"{_FILES - 1} done, 0 skipped, 1 failed" in ended.stdout) == (1, True)
    assert ended.stderr == "augmenter: s3://b/in/07.jsonl: s3://b/out/07.jsonl: access denied\n"
