"""The commands about the cache, beside running proxies: what they find, what they refuse, what they leave."""

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

Ended = subprocess.CompletedProcess[str]


def _run(*args: str) -> Ended:
    return run_command("services.cache_proxy", *args)


def _pair(pair: tuple[str, str]) -> tuple[str, ...]:
    return ("--company", pair[0], "--title", pair[1])


@pytest.mark.slow
def test_get_stats_and_invalidate_see_what_the_proxies_see(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """A pair that was asked for is found in any spelling, with its level and day; once invalidated it is gone
    from the store, and the next proxy asks again; so is all of it after --all. The settings may come from the
    environment.
    """  # noqa: D205 - one thought
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    flags = ("--cache-url", shared_redis, "--key-prefix", "admin", "--key-secret-file", str(secret))
    stage = stage_with(*flags, *UNLIMITED_RATE_FLAGS)
    pairs = make_pairs("admin", 500)
    assert stage.caller.infer(pairs).misses == 500
    found = _run("get", *flags, "--company", " ADMIN  7", "--title", "title 0")
    assert (found.returncode, found.stderr) == (0, "")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert found.stdout == f"{scripted_level(*pairs[7])}\tinferred on {today}\n"
    stats = json.loads(_run("stats", *flags, "--json").stdout)
    assert (stats["pairs"], stats["buckets_compact"], set(stats["encodings"])) == (500, True, {"listpack"})
    assert "pairs                 500" in _run("stats", *flags).stdout

    env = {"CACHE_PROXY_CACHE_URL": shared_redis, "CACHE_PROXY_KEY_PREFIX": "admin"}
    gone = run_command(
        "services.cache_proxy", "invalidate", "--key-secret-file", str(secret), *_pair(pairs[7]), env=env
    )
    assert (gone.returncode, gone.stdout) == (0, "1 pair invalidated\n")
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
        assert len(keys) <= 64 + 256  # nothing is left of what was cleared


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("get", "--company", "c"), "--title"),
        (("get",), "--company"),
        (("invalidate",), "--all"),
        (("invalidate", "--all", "--company", "c", "--title", "t"), "--all"),
        (("stats", "--key-prefix", "nobody"), "--key-prefix nobody"),
        (("get", "--company", "c", "--title", "t", "--model-version", "9"), "--model-version 9"),
        (("stats", "--normalize", "exact"), "--normalize exact"),
        (("invalidate", "--all", "--normalize", "exact"), "--normalize exact"),
        (("warm", "--normalize", "exact", "/x.jsonl"), "--normalize exact"),
        (("stats", "--cache-url", "memory:"), "memory:"),
        (("warm",), "FILES"),
        (("warm", "/x.csv"), "/x.csv"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    made: Sequence[str],
    args: tuple[str, ...],
    said: str,
) -> None:
    """Exit code 2, one line that names it, and nothing on standard output."""
    ended = _run(args[0], *made, *args[1:])
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert said in ended.stderr


@pytest.fixture(scope="module")
def made(shared_redis: str, tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """The flags of a deployment that is there."""
    flags = ("--cache-url", shared_redis, "--key-prefix", "made")
    path = tmp_path_factory.mktemp("made") / "one.jsonl"
    path.write_text('{"company": "c", "title": "t", "seniority": 1}\n')
    assert _run("warm", *flags, str(path)).returncode == 0
    return flags


def test_a_redis_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Exit code 1, and no password in it."""
    url = {"CACHE_PROXY_CACHE_URL": "redis://:hunter2@127.0.0.1:1"}
    ended = run_command("services.cache_proxy", "stats", env=url)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert "hunter2" not in ended.stderr


@pytest.mark.slow
def test_commands_reach_an_embedded_store_while_its_proxy_runs_and_after(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """They use the server that the proxy has started; when it has ended, one of their own."""
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


def test_warm_fills_the_cache_from_files_of_every_format(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """Plain, gzip and zstd, single or in a folder: a proxy answers them without a call to the model, lines
    without a level are counted and skipped, and an answer is as old as its file.
    """  # noqa: D205 - one thought
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
    ended = _run("warm", *flags, "--json", str(plain), str(tmp_path / "folder"))
    assert ended.returncode == 3, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["files"], told["pairs"], told["skipped"], told["failures"]) == (4, 3001, 6, [])
    stage = stage_with(*flags)
    reply = stage.caller.infer([(f"warm {number}", "t") for number in range(3001)])
    assert reply.hits == 3001
    assert reply.levels == [number % 7 + 1 for number in range(3001)]
    assert not stage.model.calls
    day = time.strftime("%Y-%m-%d", time.gmtime(plain.stat().st_mtime))
    assert day in _run("get", *flags, "--company", "warm 3", "--title", "t").stdout


def test_warm_reads_what_the_augmenter_reads(shared_redis: str, tmp_path: Path) -> None:
    """Bytes are believed against names, objects need no line ends, and a long line costs itself only."""
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
    ended = _run("warm", *flags, "--json", str(folder))
    assert ended.returncode == 1
    told = json.loads(ended.stdout)
    assert (told["files"], told["lines"], told["pairs"], told["skipped"]) == (3, 6, 5, 1)
    [failure] = told["failures"]
    assert failure.startswith(f"{folder}/d.json: it is a JSON array")


def test_warm_reads_fields_of_other_names(shared_redis: str, tmp_path: Path) -> None:
    """What the augmenter wrote with other fields is warmed with the same; a file is read again with them."""
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
    refused = _run("warm", *flags, "--level-field", "a.b", str(path))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_warm_names_files_that_fail_and_goes_on_with_the_others(shared_redis: str, tmp_path: Path) -> None:
    """A file that is cut short and one that is missing: exit code 1, each named, the rest is done."""
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-failures")
    good = _write(tmp_path / "good.jsonl", [_line(1)])
    cut = _write(tmp_path / "cut.jsonl.gz", [_line(number) for number in range(100)])
    cut.write_bytes(cut.read_bytes()[:-20])
    ended = _run("warm", *flags, "--json", str(cut), str(good))
    assert ended.returncode == 1
    assert str(cut) in ended.stderr
    assert json.loads(ended.stdout)["files"] == 1
    missing = _run("warm", *flags, str(tmp_path / "missing.jsonl"))
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "missing.jsonl" in missing.stderr


@pytest.mark.slow
def test_a_warm_that_was_killed_goes_on_where_it_ended(shared_redis: str, tmp_path: Path) -> None:
    """The second run reads only what the first had not written; a third finds nothing to do; one that is told
    so begins again, and after `invalidate --all` every one does.
    """  # noqa: D205 - one thought
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-killed", "--json")
    path = _write(tmp_path / "big.jsonl", [_line(number) for number in range(400_000)])
    with redis.Redis.from_url(shared_redis) as client, _started("warm", *flags, str(path)) as process:
        key = "warm-killed:c2:fold1:1:warm"
        wait_for(
            lambda: client.hvals(key) and int(client.hvals(key)[0]) > 50_000, description="it is under way"
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = int(client.hvals(key)[0])
    assert done < 400_000
    assert json.loads(_run("warm", *flags, str(path)).stdout)["lines"] == 400_000 - done
    assert json.loads(_run("stats", *flags).stdout)["pairs"] == 400_000
    assert json.loads(_run("warm", *flags, str(path)).stdout)["lines"] == 0
    assert json.loads(_run("warm", *flags, "--again", str(path)).stdout)["lines"] == 400_000
    assert json.loads(_run("invalidate", *flags, "--all").stdout) == {"invalidated": 400_000}
    assert json.loads(_run("warm", *flags, str(path)).stdout)["lines"] == 400_000


@contextmanager
def _started(*args: str) -> Iterator["subprocess.Popen[bytes]"]:
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
def test_a_redis_that_restarts_costs_warm_a_wait(tmp_path: Path) -> None:
    """It goes on as soon as the server is back, and ends well: what it writes from then on is all there."""
    path = _write(tmp_path / "many.jsonl", [_line(number) for number in range(150_000)])
    with redis_process(tmp_path) as server, ThreadPoolExecutor() as beside:
        ended = beside.submit(_run, "warm", "--cache-url", server.url, "--json", str(path))
        with server.client() as client:
            wait_for(lambda: client.dbsize() > 100, description="it writes")
        server.restart_after_crash(downtime_seconds=2)
        assert ended.result().returncode == 0, ended.result().stderr
        assert json.loads(ended.result().stdout)["pairs"] == 150_000
        asked = _run("get", *_pair(("Warm 149999", "T")), "--cache-url", server.url, "--json")
    assert asked.returncode == 0, asked.stderr


@pytest.mark.slow
def test_a_file_is_warmed_from_again_once_keys_are_made_in_another_way(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """With another secret nothing that was written counts as done, whatever bytes a file's name has."""
    path = _write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")), [_line(1)])
    secrets = [tmp_path / "one", tmp_path / "two"]
    for secret in secrets:
        secret.write_text(secret.name)
        flags = ("--cache-url", shared_redis, "--key-prefix", "warm-keys", "--key-secret-file", str(secret))
        stage_with(*flags)
        wait_for(lambda: _run("stats", *flags).returncode == 0, description="its note")  # noqa: B023
        assert json.loads(_run("warm", *flags, "--json", str(path)).stdout or "{}").get("lines") == 1
        assert _run("get", *flags, *_pair(("warm 1", "t"))).returncode == 0


def test_warm_shows_how_far_it_is(shared_redis: str, tmp_path: Path) -> None:
    """A bar on standard error, to 100 %, where it is asked for (or on a terminal)."""
    path = _write(tmp_path / "bar.jsonl", [_line(number) for number in range(2000)])
    flags = ("--cache-url", shared_redis, "--key-prefix", "warm-bar")
    ended = _run("warm", *flags, "--progress", str(path))
    assert "100%" in ended.stderr
    assert "1/1 files" in ended.stderr
    assert _run("warm", *flags, "--again", str(path)).stderr == ""


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    """An S3-compatible server."""
    with s3_server(tmp_path) as server:
        yield server


@pytest.mark.slow
def test_warm_reads_buckets(shared_redis: str, tmp_path: Path, s3: S3Server) -> None:
    """One object by its key, all below a prefix but the rejects; a bucket that is not there is named."""
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
    for place, name in enumerate(names):
        lines = [_line(number) for number in range(place * 10, place * 10 + 10)]
        client.put_object(Bucket="warm", Key=name, Body=_write(tmp_path / name, lines).read_bytes())
    there = ("--cache-url", shared_redis, "--key-prefix", "warm-s3")
    flags = (*there, "--endpoint-url", s3.endpoint_url, "--json")

    def warm(place: str) -> Ended:
        return run_command("services.cache_proxy", "warm", *flags, place, env=s3.environment)

    assert json.loads(warm("s3://warm/in/").stdout)["pairs"] == 20
    assert json.loads(warm("s3://warm/d.jsonl").stdout)["pairs"] == 10
    assert json.loads(warm("s3://warm/in/").stdout)["pairs"] == 0
    missing = warm("s3://nowhere/x.jsonl")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "s3://nowhere/x.jsonl" in missing.stderr


@pytest.mark.parametrize("junk", [b"garbage", b"-1", b"9" * 5000, b"1" + b"0" * 12, b"\xff\xfe"])
def test_warm_reads_a_file_whose_bookmark_is_garbage(junk: bytes, shared_redis: str, tmp_path: Path) -> None:
    """Such a number of lines written before says nothing: all of the file is."""
    flags = ("--cache-url", shared_redis, "--key-prefix", f"warm-junk-{junk[:13].hex()}")
    path = tmp_path / "a.jsonl"
    path.write_text('{"company": "Marked", "title": "t", "seniority": 3}\n')
    assert _run("warm", *flags, str(path)).returncode == 0
    with redis.Redis.from_url(shared_redis) as client:
        [bookmarks] = client.scan_iter(f"{flags[3]}:*:warm")
        [file] = client.hkeys(bookmarks)
        client.hset(bookmarks, file, junk)
    ended = _run("warm", *flags, "--json", str(path))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["pairs"] == 1
