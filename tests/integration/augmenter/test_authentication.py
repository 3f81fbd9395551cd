"""Tests of the connection to the proxy: TLS, client certificates and bearer tokens."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.augmenter.conftest import RunAugmenter
from tests.support.certificates import (
    make_self_signed,
)
from tests.support.model_server import ReceivedCall, ScriptedModel, answer_threes, in_sequence, scripted_model
from tests.support.postings import make_posting

_SECRET = "s3cret-of-the-day"


def _write_token(path: Path, token: str) -> Path:
    """Write a token to a file that only its owner may read."""
    path.touch(0o600)
    path.write_text(token)
    return path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with a server's, a client's and a foreign certificate, each its own CA."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("server", "client", "stranger"):
        make_self_signed(folder, name)
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", "client.key", "-out", "locked.key", "-passout", "pass:x"],
        cwd=folder,
        check=True,
    )
    (folder / "empty").touch(0o600)
    _write_token(folder / "token", f"{_SECRET}\n")
    return folder


@pytest.fixture
def guarded(certificates: Path) -> Iterator[ScriptedModel]:
    """Start a server with TLS that accepts the client's certificate and the token."""
    read = {path.name: path.read_bytes() for path in certificates.iterdir()}
    credentials = grpc.ssl_server_credentials(
        [(read["server.key"], read["server.crt"])],
        root_certificates=read["client.crt"],
        require_client_auth=True,
    )
    with scripted_model(answer_threes, credentials=credentials) as model:
        model.required_token = _SECRET
        yield model


def _flags(folder: Path, **names: str) -> list[str]:
    """Return flags: `tls_ca="server.crt"` is `--tls-ca` with that file of the folder."""
    return [
        part for name, file in names.items() for part in (f"--{name.replace('_', '-')}", str(folder / file))
    ]


_VALID_FILES = {
    "tls_ca": "server.crt",
    "tls_cert": "client.crt",
    "tls_key": "client.key",
    "token_file": "token",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Create a file with one posting."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    return tmp_path / "a.jsonl"


def test_run_with_certificate_and_token_succeeds(
    augment: RunAugmenter, source: Path, certificates: Path, guarded: ScriptedModel
) -> None:
    """A run with a client certificate and a token file augments its input over mutual TLS."""
    result = augment(
        source,
        f"{source.parent}/out/",
        "--target",
        guarded.target,
        "--retry-budget",
        "5s",
        *_flags(certificates, **_VALID_FILES),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert (source.parent / "out" / "a.jsonl").read_bytes() == make_posting()[:-1] + b', "seniority": 3}\n'


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"tls_ca": "stranger.crt"}, "UNAVAILABLE"),
        ({"tls_cert": "stranger.crt", "tls_key": "stranger.key"}, "UNAVAILABLE"),
        ({"tls_cert": None, "tls_key": None}, "UNAVAILABLE"),
        ({"token_file": "stranger.key.token"}, "UNAUTHENTICATED"),
        ({"token_file": None}, "UNAUTHENTICATED"),
    ],
)
def test_run_without_valid_certificate_or_token_fails(
    augment: RunAugmenter,
    source: Path,
    certificates: Path,
    guarded: ScriptedModel,
    wrong: dict[str, str | None],
    code: str,
) -> None:
    """Without a valid certificate or token, the run fails with the status and does not log the token."""
    _write_token(certificates / "stranger.key.token", "not-the-secret")
    given = {name: file for name, file in (_VALID_FILES | wrong).items() if file}
    result = augment(
        source,
        f"{source.parent}/out/",
        "--target",
        guarded.target,
        "--retry-budget",
        "300ms",
        "--log-level",
        "debug",
        *_flags(certificates, **given),
    )
    assert result.exit_code == 1
    assert f"{guarded.target} answered {code}" in result.stderr.splitlines()[-1]
    assert guarded.calls == []
    assert _SECRET not in result.stderr
    assert "not-the-secret" not in result.stderr


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tls_ca": "gone"}, "--tls-ca"),
        ({"tls_ca": "token"}, "--tls-ca"),
        ({"tls_cert": "gone"}, "--tls-cert"),
        ({"tls_key": "gone"}, "--tls-key"),
        ({"tls_key": "stranger.key"}, "--tls-key"),
        ({"tls_key": "client.crt"}, "--tls-key"),
        ({"tls_key": "locked.key"}, "--tls-key"),
        ({"tls_key": None}, "--tls-key"),
        ({"tls_cert": None}, "--tls-cert"),
        ({"tls_ca": None}, "--tls-ca"),
        ({"token_file": "gone"}, "--token-file"),
        ({"token_file": "empty"}, "--token-file"),
        ({"token_file": "client.key"}, "--token-file"),
    ],
)
def test_invalid_credential_file_is_a_usage_error(
    augment: RunAugmenter, source: Path, certificates: Path, given: dict[str, str | None], named: str
) -> None:
    """A missing or invalid certificate, key or token file is a usage error that names the flag."""
    flags = {name: file for name, file in (_VALID_FILES | given).items() if file}
    result = augment(
        source,
        f"{source.parent}/out/",
        "--target",
        "127.0.0.1:1",
        "--retry-budget",
        "0s",
        *_flags(certificates, **flags),
    )
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert named in result.stderr
    assert not (source.parent / "out").exists()


def test_token_without_tls_is_sent_to_this_machine_only(
    augment: RunAugmenter, source: Path, certificates: Path
) -> None:
    """Without TLS, a token is sent to a local target only. Any other target is a usage error."""
    flags = [*_flags(certificates, token_file="token"), "--retry-budget", "5s"]
    result = augment(source, f"{source.parent}/out/", "--target", "proxy.example:50051", *flags)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("augmenter: --token-file: proxy.example:50051 would get it in the clear")
    with scripted_model(answer_threes) as model:
        model.required_token = _SECRET
        assert augment(source, f"{source.parent}/out/", "--target", model.target, *flags).exit_code == 0


def test_changed_token_is_sent_with_the_next_call(augment: RunAugmenter, tmp_path: Path) -> None:
    """A token file that changes between two RPCs is read again: the second RPC has the new token."""
    token = tmp_path / "token"
    source = tmp_path / "in"
    _write_token(token, "first")
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.jsonl").write_bytes(make_posting(name))

    def rotate(call: ReceivedCall) -> list[tuple[int, int]]:
        token.write_text("second")
        model.required_token = "second"
        return answer_threes(call)

    with scripted_model(in_sequence(rotate)) as model:
        model.required_token = "first"
        result = augment(
            source, tmp_path / "out", "--target", model.target, "--concurrency", "1", "--token-file", token
        )
    assert (result.exit_code, result.stderr) == (0, "")
    assert [call.companies for call in model.calls] == [["a"], ["b"]]
