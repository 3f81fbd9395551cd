"""Tests of messages about unreachable S3 servers and invalid settings."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import aws_client, aws_reachability
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, RunResult
from tests.support.certificates import CertificateAuthority
from tests.support.postings import make_posting
from tests.support.scripted_s3 import ENVIRONMENT, Fault, ScriptedS3, scripted_s3


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")


@pytest.fixture
def s3() -> Iterator[ScriptedS3]:
    """Start a server with one file in its bucket."""
    with scripted_s3() as server:
        server.put("in/a.jsonl", make_posting())
        yield server


@pytest.fixture
def unused_url() -> str:
    """Return a URL on which no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def _run(augment: RunAugmenter, stub: RunningStub, url: str, *, bucket: str = "b") -> RunResult:
    places = (f"s3://{bucket}/in/", f"s3://{bucket}/out/")
    return augment(*places, "--target", stub.target, "--endpoint-url", url)


def _profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(f"[default]\n{text}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(path))


def test_unreachable_endpoint_is_logged_at_its_first_failure(
    augment: RunAugmenter, stub: RunningStub, unused_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreachable endpoint is logged at the first failure and at the end, one line each."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    result = _run(augment, stub, unused_url)
    first, last = result.stderr.splitlines()
    assert first.endswith(
        f"no answer from {unused_url}: Connection refused; retrying (attempt 1 of 2; "
        "AWS_MAX_ATTEMPTS sets the limit)"
    )
    assert (result.exit_code, last) == (
        1,
        f"augmenter: s3://b/out/: no answer from {unused_url}: Connection refused",
    )


def test_silent_endpoint_is_logged_within_five_seconds(
    augment: RunAugmenter, stub: RunningStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts connections but sends nothing is logged long before its timeout."""
    assert aws_reachability._FIRST_RESPONSE_SECONDS < 5
    monkeypatch.setattr(aws_reachability, "_FIRST_RESPONSE_SECONDS", 0.2)
    monkeypatch.setattr(aws_client, "_READ_TIMEOUT_SECONDS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = _run(augment, stub, url)
    first, last = result.stderr.splitlines()
    assert f"no answer from {url} for 0 s; waiting" in first
    assert last == f"augmenter: s3://b/out/: no answer from {url}: Timeout on reading data from socket"


def test_outage_of_a_server_is_logged_once_with_its_end(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several failures in a row are logged in one line, and their end in another. The run succeeds."""
    monkeypatch.setattr(aws_reachability, "_FAILURE_SECONDS", 0)
    s3.faults = [Fault("ListObjectsV2", "503", times=2)]
    result = _run(augment, stub, s3.url)
    down, up = result.stderr.splitlines()
    assert f"{s3.url} answered 503; retrying (attempt 1 of 8" in down
    assert up.endswith(f"{s3.url} answers again")
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("where", "attempts"), [("AWS_MAX_ATTEMPTS", 1), ("AWS_MAX_ATTEMPTS", 2), ("profile", 2)]
)
@pytest.mark.parametrize("mode", ["legacy", "standard"])
def test_number_of_attempts_is_configurable(
    augment: RunAugmenter,
    stub: RunningStub,
    s3: ScriptedS3,
    where: str,
    attempts: int,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """AWS_MAX_ATTEMPTS or the profile sets the number of attempts, in either retry mode."""
    monkeypatch.setenv("AWS_RETRY_MODE", mode)
    if where == "profile":
        _profile(tmp_path, monkeypatch, f"max_attempts = {attempts}")
    else:
        monkeypatch.setenv(where, str(attempts))
    s3.faults = [Fault("ListObjectsV2", "503")]
    assert _run(augment, stub, s3.url).exit_code == 1
    assert s3.count_requests("ListObjectsV2") == attempts


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_MAX_ATTEMPTS", "abc", "the S3 client: AWS_MAX_ATTEMPTS: invalid literal"),
        ("AWS_PROFILE", "nope", "the S3 client: The config profile (nope) could not be found"),
        (
            "AWS_REQUEST_CHECKSUM_CALCULATION",
            "x",
            "the S3 client: Unsupported configuration value for request",
        ),
    ],
)
def test_invalid_aws_setting_is_one_line(
    augment: RunAugmenter,
    stub: RunningStub,
    unused_url: str,
    name: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An invalid AWS setting ends the run in one line that names it, before anything is sent."""
    monkeypatch.setenv(name, value)
    result = _run(augment, stub, unused_url)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"augmenter: {message}")


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_failed_tls_handshake_is_named(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """An untrusted certificate, and a server without TLS, are named in the error line."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    has_tls = scheme == "https"
    with scripted_s3(CertificateAuthority(tmp_path).sign("server") if has_tls else None) as server:
        result = _run(augment, stub, server.url.replace("http:", "https:"))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    message = "its certificate is not trusted: " if has_tls else "TLS failed: "
    assert f"no answer from {server.url.replace('http:', 'https:')}: {message}" in result.stderr
    assert not has_tls or "AWS_CA_BUNDLE" in result.stderr


@pytest.mark.parametrize("operation", ["GetObject", "ListObjectsV2"])
def test_s3_error_names_the_file_or_prefix_once(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, operation: str
) -> None:
    """The line of an S3 error has the file or the prefix once, and then the reason."""
    s3.faults = [Fault(operation, "403", key="in/")]
    result = _run(augment, stub, s3.url)
    uri = "s3://b/in/a.jsonl" if operation == "GetObject" else "s3://b/in/"
    assert (result.exit_code, result.stderr) == (1, f"augmenter: {uri}: AccessDenied\n")


@pytest.mark.parametrize("style", ["virtual", "path", None])
def test_addressing_style_of_the_profile_is_used(
    augment: RunAugmenter,
    stub: RunningStub,
    s3: ScriptedS3,
    style: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The profile's addressing style is used also with --endpoint-url. The default is the path style."""
    if style:
        _profile(tmp_path, monkeypatch, f"s3 =\n  addressing_style = {style}")
    # The host does not exist, so its requests go through a proxy.
    monkeypatch.setenv("http_proxy", s3.url)
    # A shorter name cannot be part of a host name.
    s3.bucket = "bucket"
    result = _run(augment, stub, "http://s3.example.test", bucket=s3.bucket)
    assert (result.exit_code, result.stderr) == (0, "")
    host = "bucket.s3.example.test" if style == "virtual" else "s3.example.test"
    assert {call.headers["host"] for call in s3.requests} == {host}
    assert "out/a.jsonl" in s3.objects
