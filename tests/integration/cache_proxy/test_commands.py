"""The cache commands beside running proxies."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import zstandard

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, StartProxyEnvironment
from tests.support.caller import make_pairs
from tests.support.model_server import scripted_level
from tests.support.processes import ROOT, clean_environment, run_command
from tests.support.redis_server import redis_process, wait_for
from tests.support.s3_server import S3Server, s3_server

CompletedCommand = subprocess.CompletedProcess[str]


def _run(*args: str) -> CompletedCommand:
    return run_command("services.cache_proxy", *args)


def _pair(pair: tuple[str, str]) -> tuple[str, ...]:
    return ("--company", pair[0], "--title", pair[1])


@pytest.mark.slow
def test_get_stats_and_invalidate_act_on_cache_of_proxies(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """A cached pair is found in any spelling, with its level and day.

    Once invalidated it is gone from the store and the next proxy infers it again; so is everything after
    `--all`. The settings may come from the environment.
    """
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    flags = ("--cache-url", shared_redis, "--key-prefix", "admin", "--key-secret-file", str(secret))
    stage = stage_with(*flags, *UNLIMITED_RATE_FLAGS)
    pairs = make_pairs("admin", 500)
    assert stage.caller.infer(pairs).misses == 500
    result = _run("get", *flags, "--company", " ADMIN  7", "--title", "title 0")
    assert (result.returncode, result.stderr) == (0, "")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert result.stdout == f"{scripted_level(*pairs[7])}\tinferred on {today}\n"
    stats = json.loads(_run("stats", *flags, "--json").stdout)
    assert (stats["pairs"], stats["buckets_compact"], set(stats["encodings"])) == (500, True, {"listpack"})
    assert "pairs                 500" in _run("stats", *flags).stdout

    env = {"CACHE_PROXY_CACHE_URL": shared_redis, "CACHE_PROXY_KEY_PREFIX": "admin"}
    invalidated = run_command(
        "services.cache_proxy", "invalidate", "--key-secret-file", str(secret), *_pair(pairs[7]), env=env
    )
    assert (invalidated.returncode, invalidated.stdout) == (0, "1 pair invalidated\n")
    missing = _run("get", *flags, *_pair(pairs[7]), "--json")
    assert missing.returncode == 1
    assert json.loads(missing.stdout)["level"] is None
    assert _run("get", *flags, *_pair(pairs[8])).returncode == 0
    assert stage_with(*flags, *UNLIMITED_RATE_FLAGS, model=stage.model).caller.infer(pairs).misses == 1

    cleared = _run("invalidate", *flags, "--all", "--json")
    assert json.loads(cleared.stdout) == {"invalidated": 500}
    assert stage_with(*flags, *UNLIMITED_RATE_FLAGS, model=stage.model).caller.infer(pairs).misses == 500
    with redis.Redis.from_url(shared_redis) as client:
        keys = [key for key in client.scan_iter("admin:c2:*") if client.type(key) == b"hash"]
        # Nothing is left of what was cleared.
        assert len(keys) <= 64 + 256


@pytest.mark.parametrize(
    ("args", "error_part"),
    [
        (("get", "--company", "c"), "--title"),
        (("get",), "--company"),
        (("invalidate",), "--all"),
        (("invalidate", "--all", "--company", "c", "--title", "t"), "--all"),
        (("stats", "--key-prefix", "missing"), "--key-prefix missing"),
        (("get", "--company", "c", "--title", "t", "--model-version", "9"), "--model-version 9"),
        (("stats", "--normalize", "exact"), "--normalize exact"),
        (("invalidate", "--all", "--normalize", "exact"), "--normalize exact"),
        (("warm", "--normalize", "exact", "/x.jsonl"), "--normalize exact"),
        (("stats", "--cache-url", "memory:"), "memory:"),
        (("warm",), "FILES"),
        (("warm", "/x.csv"), "/x.csv"),
    ],
)
def test_invalid_arguments_are_one_error_line(
    existing_deployment: Sequence[str],
    args: tuple[str, ...],
    error_part: str,
) -> None:
    """The exit code is 2, the line names the cause, and nothing is printed on standard output."""
    completed = _run(args[0], *existing_deployment, *args[1:])
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (2, "", 1), (
        completed.stderr
    )
    assert error_part in completed.stderr


@pytest.fixture(scope="module")
def existing_deployment(shared_redis: str, tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Return the flags of a deployment that exists."""
    flags = ("--cache-url", shared_redis, "--key-prefix", "made")
    path = tmp_path_factory.mktemp("made") / "one.jsonl"
    path.write_text('{"company": "c", "title": "t", "seniority": 1}\n')
    assert _run("warm", *flags, str(path)).returncode == 0
    return flags


def test_unreachable_redis_is_one_error_line(tmp_path: Path) -> None:
    """The exit code is 1, and the line contains no password."""
    url = {"CACHE_PROXY_CACHE_URL": "redis://:hunter2@127.0.0.1:1"}
    completed = run_command("services.cache_proxy", "stats", env=url)
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (1, "", 1)
    assert "hunter2" not in completed.stderr


@pytest.mark.slow
def test_commands_reach_embedded_store_with_and_without_proxy(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """They use the server that a running proxy has started, or start it themselves."""
    folder = tmp_path / ("a long name " * 12).strip() / "store"
    flags = ("--cache-url", f"embedded:{folder}")
    stage = stage_with(*flags, *UNLIMITED_RATE_FLAGS)
    pairs = make_pairs("embedded", 5)
    stage.caller.infer(pairs)
    for _ in range(2):
        assert _run("get", *flags, *_pair(pairs[3])).stdout[0] == str(scripted_level(*pairs[3]))
        assert json.loads(_run("stats", *flags, "--json").stdout)["pairs"] == 5
        stage.proxy.stop()


def _line(number: int, **more: object) -> str:
    posting = {"url": f"https://e/{number}", "company": f"Warm {number}", "title": "T"}
    return json.dumps(posting | {"seniority": number % 7 + 1} | more)


def _write(path: Path, lines: Sequence[str]) -> Path:
    data = "".join(f"{line}\n" for line in lines).encode()
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        data = zstandard.compress(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_warm_reads_files_of_all_formats(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """Plain, gzip and zstd, as files or in a folder. A proxy answers their pairs.

    It does not call the model. Lines without a level are counted as skipped, and an answer is as old as its
    file.
    """
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm")
    plain = _write(tmp_path / "a.jsonl", [_line(number) for number in range(1000)])
    os.utime(plain, (time.time() - 5 * 86400,) * 2)
    _write(tmp_path / "folder/b.jsonl.gz", [_line(number) for number in range(1000, 2000)])
    _write(tmp_path / "folder/deep/c.jsonl.zst", [_line(number) for number in range(2000, 3000)])
    _write(tmp_path / "folder/_rejects/d.jsonl", [_line(5, seniority=7)])
    bad = [
        "",
        "{",
        '{"company": "c", "title": "t"}',
        _line(1, seniority=8),
        _line(1, seniority="3"),
        _line(1, title=None),
        '{"company": "\\ud800", "title": "t", "seniority": 1}',
    ]
    _write(tmp_path / "folder/e.jsonl", [*bad, _line(3000)])
    completed = _run("warm", *flags, "--json", str(plain), str(tmp_path / "folder"))
    assert completed.returncode == 3, completed.stderr
    report = json.loads(completed.stdout)
    assert (report["files"], report["pairs"], report["skipped"], report["failures"]) == (4, 3001, 6, [])
    stage = stage_with(*flags)
    reply = stage.caller.infer([(f"warm {number}", "t") for number in range(3001)])
    assert reply.hits == 3001
    assert reply.levels == [number % 7 + 1 for number in range(3001)]
    assert not stage.model.calls
    day = time.strftime("%Y-%m-%d", time.gmtime(plain.stat().st_mtime))
    assert day in _run("get", *flags, "--company", "warm 3", "--title", "t").stdout


def test_warm_detects_formats_as_augmenter_does(shared_redis: str, tmp_path: Path) -> None:
    """Content counts more than the name.

    Objects need no line ends, and a line that is too long is skipped.
    """
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-formats", "--max-line-bytes", "1KiB")
    lines = [_line(number).encode() for number in range(6)]
    long = json.dumps({**json.loads(lines[5]), "text": "x" * 2000}).encode()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.NDJSON").write_bytes(gzip.compress(lines[0]))
    (folder / "b.json.gz").write_bytes(b"\xef\xbb\xbf" + lines[1] + b"\n\xef\xbb\xbf" + lines[2])
    (folder / "c.jl").write_bytes(lines[3] + lines[4] + b"\n" + long)
    (folder / "d.json").write_bytes(b"[\n" + lines[5] + b"\n]")
    (folder / "e.csv").write_bytes(b"company,title")
    completed = _run("warm", *flags, "--json", str(folder))
    assert completed.returncode == 1
    report = json.loads(completed.stdout)
    assert (report["files"], report["lines"], report["pairs"], report["skipped"]) == (3, 6, 5, 1)
    [failure] = report["failures"]
    assert failure.startswith(f"{folder}/d.json: it is a JSON array")


def test_warm_reads_configured_fields(shared_redis: str, tmp_path: Path) -> None:
    """Output of the augmenter with other fields needs the same flags. A file is read again with them."""
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-fields")
    path = tmp_path / "a.jsonl"
    path.write_text('{"content":{"company":"Field","role":"t"},"seniority":"own","niveau":4}\n')
    assert _run("warm", *flags, str(path)).returncode == 3
    fields = (
        "--company-field",
        "content.company",
        "--title-field",
        "content.role",
        "--level-field",
        "niveau",
    )
    assert _run("warm", *flags, *fields, str(path)).returncode == 0
    assert "4" in _run("get", *flags, *_pair(("Field", "t"))).stdout
    rejected = _run("warm", *flags, "--level-field", "a.b", str(path))
    assert (rejected.returncode, rejected.stderr.count("\n")) == (2, 1)


def test_warm_names_failed_files_and_reads_the_others(shared_redis: str, tmp_path: Path) -> None:
    """A truncated and a missing file: the exit code is 1, and each is named."""
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-failures")
    good = _write(tmp_path / "good.jsonl", [_line(1)])
    cut = _write(tmp_path / "cut.jsonl.gz", [_line(number) for number in range(100)])
    cut.write_bytes(cut.read_bytes()[:-20])
    completed = _run("warm", *flags, "--json", str(cut), str(good))
    assert completed.returncode == 1
    assert str(cut) in completed.stderr
    assert json.loads(completed.stdout)["files"] == 1
    missing = _run("warm", *flags, str(tmp_path / "missing.jsonl"))
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "missing.jsonl" in missing.stderr


@pytest.mark.slow
def test_killed_warm_resumes_at_its_checkpoint(shared_redis: str, tmp_path: Path) -> None:
    """The second run reads only what the first had not written, and a third reads nothing.

    A run with `--again`, or after `invalidate --all`, starts from the beginning.
    """
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-killed", "--json")
    path = _write(tmp_path / "big.jsonl", [_line(number) for number in range(400_000)])
    with redis.Redis.from_url(shared_redis) as client, _started_command("warm", *flags, str(path)) as process:
        key = "warm-killed:c2:fold1:1:warm"
        wait_for(
            lambda: client.hvals(key) and int(client.hvals(key)[0]) > 50_000,
            description="it has written lines",
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        written = int(client.hvals(key)[0])
    assert written < 400_000
    assert json.loads(_run("warm", *flags, str(path)).stdout)["lines"] == 400_000 - written
    assert json.loads(_run("stats", *flags).stdout)["pairs"] == 400_000
    assert json.loads(_run("warm", *flags, str(path)).stdout)["lines"] == 0
    assert json.loads(_run("warm", *flags, "--again", str(path)).stdout)["lines"] == 400_000
    assert json.loads(_run("invalidate", *flags, "--all").stdout) == {"invalidated": 400_000}
    assert json.loads(_run("warm", *flags, str(path)).stdout)["lines"] == 400_000


@contextmanager
def _started_command(*args: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cache_proxy", *args],
        stdout=subprocess.DEVNULL,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_warm_continues_after_redis_restart(tmp_path: Path) -> None:
    """It waits for the server, succeeds, and everything written since is in the cache."""
    path = _write(tmp_path / "many.jsonl", [_line(number) for number in range(150_000)])
    with redis_process(tmp_path) as server, ThreadPoolExecutor() as executor:
        completed = executor.submit(_run, "warm", "--cache-url", server.url, "--json", str(path))
        with server.client() as client:
            wait_for(lambda: client.dbsize() > 100, description="it writes")
        server.restart_after_crash(downtime_seconds=2)
        assert completed.result().returncode == 0, completed.result().stderr
        assert json.loads(completed.result().stdout)["pairs"] == 150_000
        result = _run("get", *_pair(("Warm 149999", "T")), "--cache-url", server.url, "--json")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_warm_reads_file_again_after_change_of_key_secret(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """With another secret no line counts as written, whatever bytes the file name has."""
    path = _write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")), [_line(1)])
    secrets = [tmp_path / "one", tmp_path / "two"]
    for secret in secrets:
        secret.write_text(secret.name)
        flags = ("--cache-url", shared_redis, "--key-prefix", "warm-keys", "--key-secret-file", str(secret))
        stage_with(*flags)
        wait_for(lambda: _run("stats", *flags).returncode == 0, description="the deployment is registered")  # noqa: B023
        assert json.loads(_run("warm", *flags, "--json", str(path)).stdout or "{}").get("lines") == 1
        assert _run("get", *flags, *_pair(("warm 1", "t"))).returncode == 0


def test_warm_shows_progress_bar_on_request(shared_redis: str, tmp_path: Path) -> None:
    """The bar is on standard error and ends at 100 %."""
    path = _write(tmp_path / "bar.jsonl", [_line(number) for number in range(2000)])
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-bar")
    completed = _run("warm", *flags, "--progress", str(path))
    assert "100%" in completed.stderr
    assert "1/1 files" in completed.stderr
    assert _run("warm", *flags, "--again", str(path)).stderr == ""


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    """Run an S3-compatible server."""
    with s3_server(tmp_path) as server:
        yield server


@pytest.mark.slow
def test_warm_reads_s3_objects(shared_redis: str, tmp_path: Path, s3: S3Server) -> None:
    """One object, or all below a prefix except the rejects. A missing bucket is named."""
    from botocore.session import Session  # noqa: PLC0415 - slow to import, and needed here alone

    session: Any = Session()  # type: ignore[no-untyped-call]
    client = session.create_client(
        "s3",
        endpoint_url=s3.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="test-key",
        aws_secret_access_key="test-secret",
    )
    client.create_bucket(Bucket="warm")
    names = ("in/a.jsonl", "in/b.jsonl.gz", "in/_rejects/c.jsonl", "d.jsonl")
    for index, name in enumerate(names):
        lines = [_line(number) for number in range(index * 10, index * 10 + 10)]
        client.put_object(Bucket="warm", Key=name, Body=_write(tmp_path / name, lines).read_bytes())
    store_flags = ("--cache-url", shared_redis, "--key-prefix", "warm-s3")
    flags = (*store_flags, "--endpoint-url", s3.endpoint_url, "--json")

    def warm(uri: str) -> CompletedCommand:
        return run_command("services.cache_proxy", "warm", *flags, uri, env=s3.environment)

    assert json.loads(warm("s3://warm/in/").stdout)["pairs"] == 20
    assert json.loads(warm("s3://warm/d.jsonl").stdout)["pairs"] == 10
    assert json.loads(warm("s3://warm/in/").stdout)["pairs"] == 0
    missing = warm("s3://nowhere/x.jsonl")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "s3://nowhere/x.jsonl" in missing.stderr


@pytest.mark.parametrize("value", [b"garbage", b"-1", b"9" * 5000, b"1" + b"0" * 12, b"\xff\xfe"])
def test_warm_ignores_invalid_checkpoint(value: bytes, shared_redis: str, tmp_path: Path) -> None:
    """The whole file is read."""
    flags = ("--cache-url", shared_redis, "--key-prefix", f"warm-value-{value[:13].hex()}")
    path = tmp_path / "a.jsonl"
    path.write_text('{"company": "Marked", "title": "t", "seniority": 3}\n')
    assert _run("warm", *flags, str(path)).returncode == 0
    with redis.Redis.from_url(shared_redis) as client:
        [checkpoints_key] = client.scan_iter(f"{flags[3]}:*:warm")
        [file] = client.hkeys(checkpoints_key)
        client.hset(checkpoints_key, file, value)
    completed = _run("warm", *flags, "--json", str(path))
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["pairs"] == 1
