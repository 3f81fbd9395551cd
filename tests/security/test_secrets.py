"""Secrets come from files and environment variables, and appear in no output.

Over 250 lines, because each test lists every output in which a secret could appear.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from grpc import StatusCode

from services.common.redaction import has_password, strip_userinfo, warn_if_world_readable
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import open_caller
from tests.support.model_server import scripted_model
from tests.support.processes import ROOT, cache_proxy, clean_environment, run_command
from tests.support.redis_server import free_port, redis_process, wait_for

_CANARY = "c4n4ry"


def _command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.parametrize(
    ("program", "args", "scheme", "instead"),
    [
        ("cache_proxy", ("serve", "--model-target", "h:1", "--cache-url"), "redis", "CACHE_PROXY_CACHE_URL"),
        ("augmenter", ("run", "--target", "h:1", "--endpoint-url"), "https", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_password_on_the_command_line_is_rejected(
    program: str, args: tuple[str, ...], scheme: str, instead: str
) -> None:
    """The exit code is 2, and one line names the variable or file to use instead."""
    completed = run_command(f"services.{program}", *args, f"{scheme}://user:{_CANARY}@127.0.0.1:1")
    assert (completed.returncode, completed.stderr.count("\n")) == (2, 1), completed.stderr
    assert args[-1] in completed.stderr
    assert instead in completed.stderr
    assert "percent-encoded" in completed.stderr
    assert _CANARY not in completed.stderr + completed.stdout


_PIECES = ("svc7", "c0rp", "p4ss", "w0rd")
_COMMANDS = (
    ("serve", "--model-target", "h:1"),
    ("stats",),
    ("get", "--company", "c", "--title", "t"),
    ("warm", "x"),
    ("invalidate", "--all"),
)


@pytest.mark.slow
@pytest.mark.parametrize("command", _COMMANDS)
@pytest.mark.parametrize("source", ["flag", "variable"])
@pytest.mark.parametrize(
    "url",
    [
        "redis://svc7@c0rp:p4ss/w0rd#x@h",
        "valkeys://svc7:%p4ss w0rd@h",
        "redis+sentinel://svc7:p4ss/w0rd@h:1/s",
        "svc7:p4ss@w0rd:6379",
    ],
)
def test_url_with_an_unencoded_password_is_rejected_without_quoting_it(
    command: tuple[str, ...], source: str, url: str
) -> None:
    """Every command ends with exit code 2 and one line, by flag and by variable."""
    args = ("--cache-url", url) if source == "flag" else ()
    env = {"CACHE_PROXY_CACHE_URL": url} if source == "variable" else {}
    completed = run_command("services.cache_proxy", *command, *args, env=env)
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (2, "", 1), (
        completed.stderr
    )
    assert completed.stderr.startswith("cache-proxy: --cache-url: ")
    if "://" in url:
        assert "percent-encode" in completed.stderr
        assert "--cache-password-file" in completed.stderr
    assert not [piece for piece in _PIECES if piece in completed.stderr]


@pytest.mark.slow
def test_percent_encoded_password_in_the_variable_logs_in(tmp_path: Path) -> None:
    """With any characters, as the error line for unencoded passwords recommends."""
    password = "p@ss/w#rd:?%&,x é"
    with redis_process(tmp_path) as store:
        with store.client() as client:
            client.execute_command("ACL", "SETUSER", "svc@corp", "on", f">{password}", "~*", "&*", "+@all")
            client.config_set("requirepass", "another")
        login = f"{quote('svc@corp', safe='')}:{quote(password, safe='')}"
        env = {"CACHE_PROXY_CACHE_URL": f"valkey://{login}@127.0.0.1:{store.port}/0"}
        with (
            scripted_model() as model,
            cache_proxy("--model-target", model.target, *UNLIMITED_RATE_FLAGS, env=env) as proxy,
            open_caller(proxy.target) as client,
        ):
            assert client.infer([("percent", "t")]).misses == 1
            wait_for(lambda: client.infer([("percent", "t")]).hits == 1, description="it is cached")
            with urlopen(f"{proxy.http_url}/status.json", timeout=10) as response:
                assert json.load(response)["store"]["kind"] == "valkey"
            completed = run_command("services.cache_proxy", "stats", "--json", env=env)
            assert (completed.returncode, json.loads(completed.stdout)["pairs"]) == (0, 1)
            assert proxy.stop() == 0
            assert [text for text in (proxy.log, completed.stderr) if "ss/w" in text or "%2Fw" in text] == []


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("redis://h:1/0", False),
        ("redis://user@h", False),
        ("redis+cluster://h:1,h:2", False),
        ("unix:///a:b", False),
        ("embedded:/a@b:c", False),
        ("http://[::1]:9000", False),
        ("redis://:p@h", True),
        ("redis://u:p@h:1", True),
        ("redis://u:p/@h", True),
        ("unix://u:p@/s", True),
        ("redis+sentinel://:p@h:1,h:2/s", True),
        ("redis://h?password=p", True),
        ("unix:///s?PASSWORD=p", True),
        ("https://key:secret@s3", True),
    ],
)
def test_password_in_a_url_is_detected(url: str, secret: bool) -> None:
    """Before the host, with unusual characters too, and in the parameters."""
    assert has_password(url) is secret


def test_urls_in_error_messages_are_stripped_of_logins() -> None:
    """Also within other text."""
    message = f"Could not connect to 'http://k:{_CANARY}@h:1/b' or s3://u:{_CANARY}/@@x@h, https://plain/a"
    assert strip_userinfo(message) == "Could not connect to 'http://***@h:1/b' or s3://***@h, https://plain/a"


def test_world_readable_secret_file_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names the file. There is none for a file that only its owner and group can read."""
    path = tmp_path / "secret"
    path.write_text(_CANARY)
    with caplog.at_level(logging.WARNING):
        path.chmod(0o640)
        warn_if_world_readable(path, flag_name="--own")
        assert not caplog.records
        path.chmod(0o644)
        for _ in range(3):
            warn_if_world_readable(path, flag_name="--key-secret-file")
    assert [record.getMessage() for record in caplog.records] == [
        f"--key-secret-file {path}: everybody on this machine may read it; chmod o-r"
    ]


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """Return files with secrets, by flag."""
    flags = {}
    for name in ("--cache-password-file", "--key-secret-file"):
        path = tmp_path / name.strip("-")
        path.write_text(f"{_CANARY}-{name}\n")
        flags[name] = str(path)
    return flags


@pytest.mark.slow
def test_secrets_of_a_proxy_appear_in_no_output(secrets: dict[str, str], tmp_path: Path) -> None:
    """Neither in the debug log, pages, responses, process list nor commands, with the store up or down."""
    shown: list[str] = []
    flags = [part for item in secrets.items() for part in item]
    with redis_process(tmp_path) as store:
        with store.client() as client:
            client.config_set("requirepass", f"{_CANARY}-other")
        for url, env in (
            (f"redis://127.0.0.1:{store.port}", {}),
            ("", {"CACHE_PROXY_CACHE_URL": f"redis://:{_CANARY}-other@127.0.0.1:{store.port}"}),
        ):
            given = [*(flags if url else flags[2:]), *(("--cache-url", url) if url else ())]
            with (
                scripted_model() as model,
                cache_proxy(
                    "--model-target",
                    model.target,
                    "--log-level",
                    "debug",
                    *given,
                    *UNLIMITED_RATE_FLAGS,
                    env=env,
                ) as proxy,
                open_caller(proxy.target) as client,
            ):
                reply = client.infer([("secrets", "t")])
                assert reply.code is StatusCode.OK
                for path in ("metrics", "healthz", "readyz", "replica", "", "nothing"):
                    try:
                        with urlopen(f"{proxy.http_url}/{path}", timeout=30) as response:
                            shown.append(response.read().decode())
                    except HTTPError as error:
                        shown.append(error.read().decode())
                completed = run_command("services.cache_proxy", "stats", "--json", *given, env=env)
                assert (completed.returncode == 0) is not bool(url)
                if not url:
                    store.kill()
                    client.infer([("secrets when it is dead", "t")])
                    wait_for(lambda: "down" in proxy.log, description="the store's end is logged")
                shown += [str(reply), completed.stdout, completed.stderr, _command_line(proxy.process.pid)]
                assert proxy.stop() == 0
                shown += [proxy.log, json.dumps(proxy.ready)]
    assert "everybody on this machine may read it" in "".join(shown)
    assert [text for text in shown if _CANARY in text] == []


@pytest.mark.slow
def test_secrets_of_an_augmenter_appear_in_no_output(tmp_path: Path) -> None:
    """Neither its token, its keys, nor a login in the endpoint's URL, also without a proxy."""
    token = tmp_path / "token"
    token.write_text(f"{_CANARY}-token")
    source = tmp_path / "1.jsonl"
    source.write_text('{"company": "c", "title": "t"}\n')
    env = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": f"{_CANARY}-s3", "AWS_MAX_ATTEMPTS": "1"}
    common = (
        "--target",
        f"127.0.0.1:{free_port()}",
        "--token-file",
        str(token),
        "--log-level",
        "debug",
        "--retry-budget",
        "1s",
        "--deadline",
        "1s",
    )
    local = (str(source), str(tmp_path / "out.jsonl"))
    s3 = ("s3://bucket/in/", str(tmp_path / "out"))
    for places, host, code in ((local, "127.0.0.1:1", 1), (s3, "127.0.0.1:1", 1), (s3, "[nowhere", 2)):
        running = subprocess.Popen(
            [sys.executable, "-m", "services.augmenter", "run", *places, *common],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=clean_environment()
            | {"PYTHONPATH": str(ROOT)}
            | env
            | {"AUGMENTER_ENDPOINT_URL": f"http://user:{_CANARY}-url@{host}"},
        )
        command_line = _command_line(running.pid)
        shown, _ = running.communicate(timeout=100)
        assert running.returncode == code, shown
        assert _CANARY not in shown + command_line
