"""What a run says of S3 that does not answer, of credentials that cannot be had, and how it is addressed."""

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import aws_client, aws_reachability
from services.common.aws_credential_logs import shorten_credential_logs
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
    """A server with one file in its bucket."""
    with scripted_s3() as server:
        server.put("in/a.jsonl", make_posting())
        yield server


@pytest.fixture
def closed() -> str:
    """An address where nothing listens."""
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
    augment: RunAugmenter, stub: RunningStub, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line while it is tried again, one at the end: neither repeats the request's address."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    ended = _run(augment, stub, closed)
    first, last = ended.stderr.splitlines()
    assert first.endswith(
        f"no answer from {closed}: Connection refused; retrying (attempt 1 of 2; "
        "AWS_MAX_ATTEMPTS sets the limit)"
    )
    assert (ended.exit_code, last) == (
        1,
        f"augmenter: s3://b/out/: no answer from {closed}: Connection refused",
    )


def test_silent_endpoint_is_logged_within_five_seconds(
    augment: RunAugmenter, stub: RunningStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes connections and says nothing is named long before its timeout."""
    assert aws_reachability._FIRST_RESPONSE_SECONDS < 5
    monkeypatch.setattr(aws_reachability, "_FIRST_RESPONSE_SECONDS", 0.2)
    monkeypatch.setattr(aws_client, "_READ_TIMEOUT_SECONDS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = _run(augment, stub, url)
    first, last = ended.stderr.splitlines()
    assert f"no answer from {url} for 0 s; waiting" in first
    assert last == f"augmenter: s3://b/out/: no answer from {url}: Timeout on reading data from socket"


def test_silence_while_credentials_are_fetched_is_logged(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An STS that takes connections and says nothing: the line is not about the S3 server."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text("token")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/augmenter")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setattr(aws_reachability, "_FIRST_RESPONSE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{silent.getsockname()[1]}")
        closing = threading.Timer(1, silent.shutdown, [socket.SHUT_RDWR])
        closing.start()
        ended = _run(augment, stub, s3.url)
        closing.join()
    assert f"no credentials for {s3.url} for 0 s; waiting" in ended.stderr.splitlines()[0]
    assert (ended.exit_code, "credentials could not be refreshed" in ended.stderr) == (1, True)


def test_server_that_fails_for_a_while_is_logged_once_and_when_it_is_back(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several failures in a row are one line, their end another; the run succeeds."""
    monkeypatch.setattr(aws_reachability, "_FAILURE_SECONDS", 0)
    s3.faults = [Fault("ListObjectsV2", "503", times=2)]
    ended = _run(augment, stub, s3.url)
    down, up = ended.stderr.splitlines()
    assert f"{s3.url} answered 503; retrying (attempt 1 of 8" in down
    assert up.endswith(f"{s3.url} answers again")
    assert ended.exit_code == 0


@pytest.mark.parametrize(
    ("where", "attempts"), [("AWS_MAX_ATTEMPTS", 1), ("AWS_MAX_ATTEMPTS", 2), ("profile", 2)]
)
@pytest.mark.parametrize("mode", ["legacy", "standard"])
def test_number_of_attempts_is_the_users(
    augment: RunAugmenter,
    stub: RunningStub,
    s3: ScriptedS3,
    where: str,
    attempts: int,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """AWS_MAX_ATTEMPTS, or the profile's, with either retry mode: so often a failing call is made."""
    monkeypatch.setenv("AWS_RETRY_MODE", mode)
    if where == "profile":
        _profile(tmp_path, monkeypatch, f"max_attempts = {attempts}")
    else:
        monkeypatch.setenv(where, str(attempts))
    s3.faults = [Fault("ListObjectsV2", "503")]
    assert _run(augment, stub, s3.url).exit_code == 1
    assert s3.count_requests("ListObjectsV2") == attempts


@pytest.mark.parametrize(
    ("name", "value", "told"),
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
def test_settings_that_cannot_be_meant_are_one_line(
    augment: RunAugmenter,
    stub: RunningStub,
    closed: str,
    name: str,
    value: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They end the run before anything is sent, and the setting is named."""
    monkeypatch.setenv(name, value)
    ended = _run(augment, stub, closed)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith(f"augmenter: {told}")


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_failed_handshakes_are_named(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A certificate that is not trusted, and a server without TLS, are named as what they are."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    by_tls = scheme == "https"
    with scripted_s3(CertificateAuthority(tmp_path).sign("server") if by_tls else None) as server:
        ended = _run(augment, stub, server.url.replace("http:", "https:"))
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    said = "its certificate is not trusted: " if by_tls else "TLS failed: "
    assert f"no answer from {server.url.replace('http:', 'https:')}: {said}" in ended.stderr
    assert not by_tls or "AWS_CA_BUNDLE" in ended.stderr


@pytest.mark.parametrize("operation", ["GetObject", "ListObjectsV2"])
def test_errors_of_s3_name_the_place_once(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, operation: str
) -> None:
    """The file or the prefix, then the reason."""
    s3.faults = [Fault(operation, "403", key="in/")]
    ended = _run(augment, stub, s3.url)
    place = "s3://b/in/a.jsonl" if operation == "GetObject" else "s3://b/in/"
    assert (ended.exit_code, ended.stderr) == (1, f"augmenter: {place}: AccessDenied\n")


def test_credentials_that_cannot_be_refreshed_are_one_line(
    augment: RunAugmenter, stub: RunningStub, closed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A role whose token file is gone, or whose STS does not answer: one line that names the credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    token = tmp_path / "token"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/augmenter")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", closed)
    begin = "augmenter: s3://b/out/: credentials could not be refreshed: "
    assert _run(augment, stub, closed).stderr == f"{begin}{token}: No such file or directory\n"
    token.write_text("token")
    ended = _run(augment, stub, closed)
    assert (ended.exit_code, ended.stderr) == (1, f"{begin}no answer from {closed}: Connection refused\n")


@pytest.mark.parametrize("command", ["/nowhere/at-all", "/bin/echo hello", "/bin/false", "/bin/echo {}"])
def test_credentials_of_a_command_that_fails_are_one_line(
    augment: RunAugmenter,
    stub: RunningStub,
    closed: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
) -> None:
    """Whatever `credential_process` does, the run ends with one line, and no library's stack."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    _profile(tmp_path, monkeypatch, f"credential_process = {command}")
    ended = _run(augment, stub, closed)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("augmenter: the S3 client: credentials: ")


def test_refresh_that_fails_early_is_logged_in_one_line_and_once(caplog: pytest.LogCaptureFixture) -> None:
    """The library logs it with its stack and with every request, while the old credentials still serve."""
    shorten_credential_logs()
    log = logging.getLogger("aiobotocore.credentials")
    for _ in range(3):
        try:
            raise TimeoutError("metadata service")  # noqa: TRY301
        except TimeoutError:
            log.warning(
                "Refreshing temporary credentials failed during %s refresh period.", "advisory", exc_info=True
            )
    [record] = caplog.records
    assert record.getMessage().endswith("failed during advisory refresh period: metadata service")
    assert record.exc_info is None


@pytest.mark.parametrize("style", ["virtual", "path", None])
def test_addressing_style_of_the_profile_is_kept(
    augment: RunAugmenter,
    stub: RunningStub,
    s3: ScriptedS3,
    style: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Also with --endpoint-url; where the profile has none, the bucket is in the path."""
    if style:
        _profile(tmp_path, monkeypatch, f"s3 =\n  addressing_style = {style}")
    monkeypatch.setenv("http_proxy", s3.url)  # no such host is known
    s3.bucket = "bucket"  # a shorter name is no part of a host's
    ended = _run(augment, stub, "http://s3.example.test", bucket=s3.bucket)
    assert (ended.exit_code, ended.stderr) == (0, "")
    host = "bucket.s3.example.test" if style == "virtual" else "s3.example.test"
    assert {call.headers["host"] for call in s3.requests} == {host}
    assert "out/a.jsonl" in s3.objects
