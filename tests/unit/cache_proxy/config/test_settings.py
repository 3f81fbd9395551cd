"""The flags of the proxy: parsing, rejected values, and secrets that are never shown."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from services.cache_proxy.cli import cli
from services.cache_proxy.config.auth_settings import CallerAuthSettings, ModelAuthSettings
from services.cache_proxy.config.cache_settings import AnswerSettings, CacheSettings
from services.cache_proxy.config.cache_url import redact_url
from services.cache_proxy.config.model_settings import ModelSettings
from services.cache_proxy.config.secret_file import read_secret
from services.cache_proxy.config.server_settings import ServerSettings
from services.common import options
from services.common.errors import UsageError

UsageErrorRunner = Callable[..., str]


@pytest.fixture
def usage_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> UsageErrorRunner:
    """Run a command in this process. Return its one error line after exit code 2."""

    def run(*args: str, env: Mapping[str, str] | None = None, command: str = "serve") -> str:
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            options.run_command(cli, program="cache-proxy", args=[command, *args])
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    return run


def _parse(settings: type, *args: str) -> object:
    command = cli.commands["serve"]
    with command.make_context("serve", ["--model-target", "m:1", *args]) as context:
        return options.read_settings(settings, context.params)


@pytest.mark.parametrize(
    "flag",
    [
        *(
            f"--{name} {value}"
            for name in ("linger", "model-deadline", "max-wait", "drain-delay", "cache-timeout")
            for value in ("5", "-1s", "inf", "nans", "1y", "1s2")
        ),
        *(
            f"--{name} {value}"
            for name in ("l1-max-bytes", "max-request-bytes", "model-batch-bytes")
            for value in ("-1", "1mb", "1.5", "inf", "nan", "64 M iB")
        ),
        *(f"--model-rate {value}" for value in ("0", "-1", "inf", "nan", "1e10", "1e-7", "1e-320", "fast")),
        *(f"--model-calls-per-second {value}" for value in ("-1", "inf", "nan", "-0.1", "1e-320", "x")),
        *(
            f"--{name} {value}"
            for name in ("model-batch-size", "max-request-pairs", "max-queued-pairs", "expected-replicas")
            for value in ("0", "-1", "1.5", "1e3", "inf")
        ),
        "--model-batch-size 1001",
        "--normalize maybe",
        "--log-format xml",
        "--log-level loud",
        "--cache-url http://h",
        "--cache-url redis",
        "--cache-url nothing:",
        "--cache-url embedded",
        "--key-prefix ",
        "--max-wait 0",
        "--model-deadline 0s",
        "--cache-timeout 0ms",
        "--max-field-bytes 0",
        "--max-request-bytes 0",
        "--listen nonsense",
        "--listen 127.0.0.1:65536",
        "--listen 127.0.0.1:",
        "--listen 127.0.0.1:-1",
        "--http-listen 1:2:x",
        "--http-listen 127.0.0.1:99999",
        "--http-listen unix:/x",
        "--cache-tls-ca /dev/null",
        "--cache-ttl 12h",
        "--cache-ttl 36h",
        "--cache-ttl 30",
        "--cache-ttl -1d",
        "--cache-ttl 9999d",
        "--previous-model-version 1",
        "--no-such-flag x",
        "--tls-cert c",
        "--tls-key k",
        "--tls-client-ca c",
        "--model-tls-cert c",
        "--model-tls-key k",
        "--model-token-file t",
    ],
)
def test_invalid_value_is_one_error_line_with_flag_name(usage_error: UsageErrorRunner, flag: str) -> None:
    """The exit code is 2, and nothing is printed on standard output."""
    name, value = flag.split(" ", 1)
    line = usage_error("--model-target", "m:1", name, value)
    assert name in line


@pytest.mark.parametrize(
    ("args", "missing_flag"),
    [
        ("--tls-cert c --tls-client-ca a", "--tls-key"),
        ("--model-tls-cert c --model-tls-key k", "--model-tls-ca"),
        ("--model-tls-ca a --model-tls-key k", "--model-tls-cert"),
    ],
)
def test_incomplete_certificate_files_are_rejected(
    usage_error: UsageErrorRunner, args: str, missing_flag: str
) -> None:
    """A certificate needs its key, and one for the model also the CA that enables TLS."""
    assert missing_flag in usage_error("--model-target", "m:1", *args.split())


def test_model_token_without_tls_is_allowed_on_loopback_only(usage_error: UsageErrorRunner) -> None:
    """Without TLS a token for another machine is rejected."""
    line = usage_error("--model-target", "dns:///model.example:1", "--model-token-file", "t")
    assert "model.example:1 would get it in the clear" in line
    for args in (("--model-tls-ca", "a"), ("--model-target", "127.0.0.1:1")):
        parsed = _parse(ModelAuthSettings, "--model-token-file", "t", *args)
        assert isinstance(parsed, ModelAuthSettings)
        parsed.require_encrypted("m:1" if args[0] == "--model-tls-ca" else "127.0.0.1:1")


def test_model_target_is_required(usage_error: UsageErrorRunner) -> None:
    """There is no default, and an empty target is rejected."""
    assert "--model-target" in usage_error()
    assert "--model-target" in usage_error("--model-target", " ")


def test_invalid_environment_variable_is_named(usage_error: UsageErrorRunner) -> None:
    """A value from the environment fails like that of a flag."""
    line = usage_error("--model-target", "m:1", env={"CACHE_PROXY_MAX_WAIT": "soon"})
    assert "max-wait" in line
    assert "soon" in line


def test_flag_overrides_variable_and_unknown_variables_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways to set a value work, and nothing else in the environment matters."""
    monkeypatch.setenv("CACHE_PROXY_MODEL_RATE", "5")
    monkeypatch.setenv("CACHE_PROXY_LINGER", "1s")
    monkeypatch.setenv("CACHE_PROXY_NO_SUCH_THING", "1")
    settings = _parse(ModelSettings, "--model-rate", "7")
    assert isinstance(settings, ModelSettings)
    assert (settings.model_rate, settings.linger_seconds) == (7, 1)


@pytest.mark.parametrize(
    ("args", "variable"),
    [
        (["--listen", "h:1,h:2"], ""),
        (["--listen", "h:1", "--listen", "h:2"], ""),
        ([], "h:1,h:2"),
        ([], " h:1 , h:2,"),
    ],
)
def test_list_flag_accepts_commas_and_repetition(
    args: list[str], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--listen` may be repeated or have commas, also in the environment."""
    monkeypatch.setenv("CACHE_PROXY_LISTEN", variable)
    settings = _parse(ServerSettings, *args)
    assert isinstance(settings, ServerSettings)
    assert settings.listen == ("h:1", "h:2")


def test_defaults_match_contract() -> None:
    """The defaults are those of the table of flags."""
    server, model, cache, answers = (
        _parse(part) for part in (ServerSettings, ModelSettings, CacheSettings, AnswerSettings)
    )
    assert server == ServerSettings(
        listen=("0.0.0.0:50051",),
        http_listen="0.0.0.0:9464",
        l1_max_bytes=256 * 2**20,
        max_request_pairs=100_000,
        max_request_bytes=64 * 2**20,
        max_field_bytes=4096,
        max_queued_pairs=1_000_000,
        max_queued_bytes=2**30,
        max_wait_seconds=300,
        max_connection_age_seconds=1800,
        drain_delay_seconds=5,
        drain_timeout_seconds=30,
        log_format="json",
        log_level="info",
    )
    assert model == ModelSettings(
        model_target="m:1",
        model_batch_size=1000,
        model_batch_bytes=3 * 2**20,
        model_rate=1000,
        model_calls_per_second=1,
        expected_replicas=1,
        linger_seconds=0.02,
        model_deadline_seconds=30,
    )
    assert cache == CacheSettings(cache_url="embedded:", cache_timeout_seconds=0.25)
    assert _parse(CallerAuthSettings) == CallerAuthSettings()
    assert _parse(ModelAuthSettings) == ModelAuthSettings()
    assert answers == AnswerSettings(cache_ttl_seconds=0, serve_stale=False, previous_model_version=None)


def test_cache_ttl_is_in_whole_days() -> None:
    """In any unit."""
    for text, days in (("0", 0), ("30d", 30), ("48h", 2)):
        answers = _parse(AnswerSettings, "--cache-ttl", text, "--serve-stale")
        assert isinstance(answers, AnswerSettings)
        assert (answers.ttl_days, answers.serve_stale) == (days, True)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@h:1/0",
        "redis://user:hunter2@h",
        "rediss://u:hunter2@h:port",
        "redis://u:hun/hunter2@h:1",
        "redis://u:hunter2@[h",
        "redis://u:a@hunter2@h",
        "redis://h?password=hunter2",
        "unix://u:hunter2@/s",
        "unix:///s?db=0&password=hunter2",
        "redis://u:hunter2#x@h",
        "redis+cluster://u:hunter2@h:1,h:2",
        "redis+sentinel://:hunter2@h:x/s",
    ],
)
def test_password_is_never_shown(usage_error: UsageErrorRunner, url: str) -> None:
    """Neither in the redacted URL nor in the error line, however the URL is written."""
    assert "hunter2" not in redact_url(url)
    line = usage_error(
        "--model-target", "m:1", "--cache-url", url.replace("redis", "radish").replace("unix", "x")
    )
    assert "hunter2" not in line


def test_redacted_url_keeps_host_and_database() -> None:
    """An operator can read where the cache is."""
    assert redact_url("redis://cache.internal:6379/2") == "redis://cache.internal:6379/2"
    assert redact_url("redis://user:pw@cache.internal:6379/2") == "redis://***@cache.internal:6379/2"


def test_secret_is_file_content_without_final_newline(tmp_path: Path) -> None:
    """A file that is unreadable or empty is rejected with the name of the flag."""
    path = tmp_path / "secret"
    path.write_bytes(b" s\xffcret \r\n")
    assert read_secret(str(path), flag_name="--x") == b" s\xffcret "
    assert read_secret(None, flag_name="--x") is None
    path.write_bytes(b"\n")
    for bad in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="--x"):
            read_secret(str(bad), flag_name="--x")
