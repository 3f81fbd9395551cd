"""The proxy's flags: what they mean, which values are refused, and that no secret is ever shown."""

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

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run the command line in this process; its one line and exit code 2."""

    def run(*args: str, env: Mapping[str, str] | None = None, command: str = "serve") -> str:
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            options.run_command(cli, program="cache-proxy", args=[command, *args])
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    return run


def _parsed(settings: type, *args: str) -> object:
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
def test_a_bad_value_is_one_line_that_names_its_flag(refused: Refused, flag: str) -> None:
    """Exit code 2, nothing on standard output, and one line with the flag in it."""
    name, value = flag.split(" ", 1)
    line = refused("--model-target", "m:1", name, value)
    assert name in line


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--tls-cert c --tls-client-ca a", "--tls-key"),
        ("--model-tls-cert c --model-tls-key k", "--model-tls-ca"),
        ("--model-tls-ca a --model-tls-key k", "--model-tls-cert"),
    ],
)
def test_certificates_come_whole(refused: Refused, args: str, named: str) -> None:
    """Each with its key, and towards the model with the CA that says that the way is encrypted."""
    assert named in refused("--model-target", "m:1", *args.split())


def test_a_token_for_the_model_goes_in_the_clear_to_this_machine_only(refused: Refused) -> None:
    """Else it is refused; with TLS, or over loopback, it is not."""
    line = refused("--model-target", "dns:///model.example:1", "--model-token-file", "t")
    assert "model.example:1 would get it in the clear" in line
    for args in (("--model-tls-ca", "a"), ("--model-target", "127.0.0.1:1")):
        parsed = _parsed(ModelAuthSettings, "--model-token-file", "t", *args)
        assert isinstance(parsed, ModelAuthSettings)
        parsed.require_encrypted("m:1" if args[0] == "--model-tls-ca" else "127.0.0.1:1")


def test_the_model_must_be_named(refused: Refused) -> None:
    """There is no default for whom to ask, and an empty one is none."""
    assert "--model-target" in refused()
    assert "--model-target" in refused("--model-target", " ")


def test_a_bad_variable_is_named_too(refused: Refused) -> None:
    """A value that came from the environment fails like a flag's, naming either."""
    line = refused("--model-target", "m:1", env={"CACHE_PROXY_MAX_WAIT": "soon"})
    assert "max-wait" in line
    assert "soon" in line


def test_a_flag_wins_over_its_variable_and_unknown_variables_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both spellings of a setting reach it; nothing else in the environment matters."""
    monkeypatch.setenv("CACHE_PROXY_MODEL_RATE", "5")
    monkeypatch.setenv("CACHE_PROXY_LINGER", "1s")
    monkeypatch.setenv("CACHE_PROXY_NO_SUCH_THING", "1")
    settings = _parsed(ModelSettings, "--model-rate", "7")
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
def test_lists_go_by_comma_or_by_repetition(
    args: list[str], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--listen` may be said twice, or once with commas, in the environment too."""
    monkeypatch.setenv("CACHE_PROXY_LISTEN", variable)
    settings = _parsed(ServerSettings, *args)
    assert isinstance(settings, ServerSettings)
    assert settings.listen == ("h:1", "h:2")


def test_the_defaults_are_the_contracts() -> None:
    """What the table of flags promises to those who give none."""
    server, model, cache, answers = (
        _parsed(part) for part in (ServerSettings, ModelSettings, CacheSettings, AnswerSettings)
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
    assert _parsed(CallerAuthSettings) == CallerAuthSettings()
    assert _parsed(ModelAuthSettings) == ModelAuthSettings()
    assert answers == AnswerSettings(cache_ttl_seconds=0, serve_stale=False, previous_model_version=None)


def test_an_age_is_in_whole_days() -> None:
    """However it is written."""
    for text, days in (("0", 0), ("30d", 30), ("48h", 2)):
        answers = _parsed(AnswerSettings, "--cache-ttl", text, "--serve-stale")
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
def test_a_password_is_never_shown(refused: Refused, url: str) -> None:
    """Neither where the URL is logged nor in the line that refuses it, however it is written."""
    assert "hunter2" not in redact_url(url)
    line = refused(
        "--model-target", "m:1", "--cache-url", url.replace("redis", "radish").replace("unix", "x")
    )
    assert "hunter2" not in line


def test_a_url_without_a_secret_is_shown_as_it_is() -> None:
    """An operator reads where the cache is."""
    assert redact_url("redis://cache.internal:6379/2") == "redis://cache.internal:6379/2"
    assert redact_url("redis://user:pw@cache.internal:6379/2") == "redis://***@cache.internal:6379/2"


def test_a_secret_is_a_files_content_less_its_final_newline(tmp_path: Path) -> None:
    """As editors write them; what is unreadable or empty is refused by the flag's name."""
    path = tmp_path / "secret"
    path.write_bytes(b" s\xffcret \r\n")
    assert read_secret(str(path), flag_name="--x") == b" s\xffcret "
    assert read_secret(None, flag_name="--x") is None
    path.write_bytes(b"\n")
    for bad in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="--x"):
            read_secret(str(bad), flag_name="--x")
