"""Tests of S3 servers that differ from AWS in checksums or resets."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, RunResult
from tests.support.certificates import CertificateAuthority
from tests.support.postings import make_posting
from tests.support.scripted_s3 import ENVIRONMENT, Fault, ScriptedS3, scripted_s3

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
    """Start a server with plain HTTP."""
    with scripted_s3() as server:
        yield server


@pytest.fixture
def https_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedS3]:
    """Start a server with HTTPS, whose CA is in the environment."""
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
def test_body_has_no_chunked_framing_for_other_servers(
    augment: RunAugmenter,
    stub: RunningStub,
    https_s3: ScriptedS3,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A server that would store the framing of chunked bodies gets plain bodies."""
    https_s3.stores_framing = True
    https_s3.put("in/a.jsonl", _TEXT + b"\nbad")
    if where == "profile":
        _profile(tmp_path, monkeypatch, f"endpoint_url = {https_s3.url}")
    elif where != "flag":
        monkeypatch.setenv(where, https_s3.url)
    result = _run(augment, stub, https_s3, "--ok-rejects", by_flag=where == "flag")
    assert (result.exit_code, result.stderr) == (0, "")
    assert https_s3.objects["out/a.jsonl"].data == _expected(_LINES)
    assert https_s3.objects["out/_rejects/a.jsonl"].data == b"bad\n"
    assert not any("x-amz-sdk-checksum-algorithm" in call.headers for call in https_s3.requests)


def test_checksum_headers_are_not_sent_to_other_servers(
    augment: RunAugmenter, stub: RunningStub, https_s3: ScriptedS3
) -> None:
    """A server that rejects checksum headers gets none, also with the parts of a large output."""
    https_s3.refuses_checksums = True
    https_s3.put("in/a.jsonl", _LARGE)
    result = _run(augment, stub, https_s3)
    assert (result.exit_code, result.stderr) == (0, "")
    assert https_s3.objects["out/a.jsonl"].data == _expected(_LARGE_LINES)


@pytest.mark.parametrize("where", ["environment", "profile"])
def test_configured_checksums_are_sent_and_declared(
    augment: RunAugmenter,
    stub: RunningStub,
    https_s3: ScriptedS3,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """If configured, each body has a checksum, and a multipart upload declares the kind of checksum."""
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


def test_checksum_mismatch_fails_the_file_in_one_line(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """A wrong checksum fails the file at once, in one line. Nothing is written, and no range is requested."""
    s3.sends_checksums = s3.wrong_checksums = True
    s3.put("in/a.jsonl", _TEXT)
    result = _run(augment, stub, s3)
    assert result.exit_code == 1
    assert result.stderr.startswith("augmenter: s3://b/in/a.jsonl: checksum mismatch: Expected checksum ")
    assert result.stderr.count("\n") == result.stderr.count("s3://") == 1
    assert s3.keys("out/") == []
    assert (s3.count_requests("GetObject"), s3.count_requests("GetObject (range)")) == (1, 0)


@pytest.mark.parametrize("text", [_TEXT, b""])
def test_reset_after_the_last_byte_is_ignored(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, text: bytes
) -> None:
    """A connection that is reset after the last byte of an object is not an error."""
    s3.sends_checksums = True
    s3.faults = [Fault("GetObject", "end")]
    s3.put("in/a.jsonl", text)
    result = _run(augment, stub, s3)
    assert (result.exit_code, result.stderr) == (0, "")
    assert s3.objects["out/a.jsonl"].data == (_expected(_LINES) if text else b"")
    assert (s3.count_requests("GetObject"), s3.count_requests("GetObject (range)")) == (1, 0)


def test_checksum_is_checked_after_a_reset_at_the_end(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3
) -> None:
    """The checksum is checked even if the connection is reset after the last byte."""
    s3.sends_checksums = s3.wrong_checksums = True
    s3.faults = [Fault("GetObject", "end")]
    s3.put("in/a.jsonl", _TEXT)
    result = _run(augment, stub, s3)
    assert (result.exit_code, "checksum mismatch" in result.stderr) == (1, True)
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
def test_resumed_download_is_checked_against_the_whole_objects_checksum(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, wrong: bool, ignores_ranges: bool, checksum: str
) -> None:
    """A resumed download has every byte once, even without ranges, and its checksum is checked."""
    s3.sends_checksums = s3.sends_checksums_with_ranges = True
    s3.wrong_checksums = wrong
    s3.ignores_ranges = ignores_ranges
    s3.checksum = checksum
    s3.faults = [Fault("GetObject", "cut"), Fault("GetObject (range)", "cut", times=1)]
    lines = [make_posting(id=i, text=random.Random(i).randbytes(100).hex()) for i in range(2_000)]
    s3.put("in/a.jsonl", b"\n".join(lines))
    result = _run(augment, stub, s3)
    if wrong:
        assert (result.exit_code, "checksum mismatch" in result.stderr) == (1, True)
        assert s3.keys("out/") == []
    else:
        assert (result.exit_code, result.stderr) == (0, "")
        assert s3.objects["out/a.jsonl"].data == _expected(lines)
    ranges = [call.headers for call in s3.requests if call.operation == "GetObject (range)"]
    assert len(ranges) == 2
    assert not any("x-amz-checksum-mode" in headers for headers in ranges)
