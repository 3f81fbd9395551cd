"""Tests of messages about AWS credentials that cannot be obtained."""

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import aws_reachability
from services.common.aws_credential_logs import shorten_credential_logs
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, RunResult
from tests.support.postings import make_posting
from tests.support.scripted_s3 import ENVIRONMENT, ScriptedS3, scripted_s3


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


def test_silence_while_credentials_are_fetched_is_logged(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If an STS server sends nothing, the log line is about credentials, not about the S3 server."""
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
        result = _run(augment, stub, s3.url)
        closing.join()
    assert f"no credentials for {s3.url} for 0 s; waiting" in result.stderr.splitlines()[0]
    assert (result.exit_code, "credentials could not be refreshed" in result.stderr) == (1, True)


def test_credentials_that_cannot_be_refreshed_are_one_line(
    augment: RunAugmenter, stub: RunningStub, unused_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing token file, or an unreachable STS, is one line that names the credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    token = tmp_path / "token"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/augmenter")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", unused_url)
    prefix = "augmenter: s3://b/out/: credentials could not be refreshed: "
    assert _run(augment, stub, unused_url).stderr == f"{prefix}{token}: No such file or directory\n"
    token.write_text("token")
    result = _run(augment, stub, unused_url)
    assert (result.exit_code, result.stderr) == (
        1,
        f"{prefix}no answer from {unused_url}: Connection refused\n",
    )


@pytest.mark.parametrize("command", ["/nowhere/at-all", "/bin/echo hello", "/bin/false", "/bin/echo {}"])
def test_failing_credential_process_is_one_line(
    augment: RunAugmenter,
    stub: RunningStub,
    unused_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
) -> None:
    """If `credential_process` fails in any way, the run ends with one line and no stack trace."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    _profile(tmp_path, monkeypatch, f"credential_process = {command}")
    result = _run(augment, stub, unused_url)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("augmenter: the S3 client: credentials: ")


def test_failed_early_refresh_of_credentials_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A failed early refresh of credentials is logged once, in one line.

    The library would log it with a stack trace for every request, while the old credentials are still valid.
    """
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
