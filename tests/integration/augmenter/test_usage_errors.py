"""Tests of usage errors: exit code 2 and one line, before anything is read."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from services.augmenter.paths import LocalPath, S3Uri, resolve_paths
from services.common.errors import UsageError
from services.common.storage.errors import StorageError
from services.common.storage.local import LocalStore
from services.common.storage.protocol import ABSENT, FileInfo
from tests.integration.augmenter.conftest import RunAugmenter, make_posting
from tests.support.processes import run_command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Create a folder with one posting, and a link to it."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(make_posting())
    (tmp_path / "link").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("in", "in"), "OUTPUT"),
        (("in", "in/deep/out"), "OUTPUT"),
        (("in", "in/../in/out"), "OUTPUT"),
        (("in", "link/out"), "OUTPUT"),
        (("link", "in/out"), "OUTPUT"),
        (("in/a.jsonl", "in/a.jsonl"), "OUTPUT"),
        (("in/a.jsonl", "link/"), "OUTPUT"),
        (("in", "out", "--rejects", "in/rejects"), "--rejects"),
        (("in", "out", "--rejects", "link"), "--rejects"),
        (("in", "out", "--rejects", "out"), "--rejects"),
        (("in/a.jsonl", "out/", "--rejects", "in"), "--rejects"),
        (("in/a.jsonl", "out/", "--rejects", "out"), "--rejects"),
        (("in/a.jsonl", "b.jsonl.gz"), "b.jsonl.gz"),
        (("in/a.jsonl", "b"), ".jsonl"),
        (("in", "out.jsonl"), "out.jsonl"),
        (("in", "plain.txt"), "plain.txt"),
        (("plain.txt", "out"), "plain.txt"),
        (("in", "gs://bucket/x"), "gs://bucket/x"),
        (("s3://", "out"), "s3://"),
        (("", "out"), "INPUT"),
        (("in",), "INPUT"),
        (("in", "out", "--watch", "--once"), "--watch"),
        (("in", "out", "--watch", "--poll-interval", "0"), "--poll-interval"),
        (("in", "out", "--watch", "--dry-run"), "--dry-run"),
        (("in/a.jsonl", "out/", "--watch"), "--watch"),
        (("in", "out", "--sqs-queue-url", "http://127.0.0.1:1/q"), "--sqs-queue-url"),
        (("s3://b/raw/", "out", "--sqs-queue-url", "http://127.0.0.1:1/q", "--shard", "0/2"), "--shard"),
        (("in", "out", "--shard", "2/2"), "--shard"),
        (("in", "out", "--shard", "x"), "--shard"),
        (("in", "out", "--once", "false"), "--once"),
        (("in", "out", "--endpoint-url", "localhost:9000"), "--endpoint-url"),
        (("in", "out", "--endpoint-url", ""), "--endpoint-url"),
        (("in", "out", "--endpoint-url", "http:///bucket"), "--endpoint-url"),
        (("in", "out", "--endpoint-url", "ftp://host"), "--endpoint-url"),
        (("in", "out", "--endpoint-url", "http://host:99999"), "--endpoint-url"),
        (("in", "out", "--concurrency", "0"), "--concurrency"),
        (("in", "out", "--batch-size", "x"), "--batch-size"),
        (("in", "out", "--deadline", "0"), "--deadline"),
        (("in", "out", "--deadline", "10"), "--deadline"),
        (("in", "out", "--priority", "high"), "--priority"),
        (("in", "out", "--caller", "café"), "--caller"),
        (("in", "out", "--caller", ""), "--caller"),
        (("in", "out", "--dry-run", "--summary-json", "x"), "--summary-json"),
        (("in", "out", "--http-listen", "nonsense"), "--http-listen"),
        (("in", "out", "--http-listen", "127.0.0.1:99999"), "--http-listen"),
        (("in", "."), "INPUT in is inside OUTPUT"),
    ],
)
def test_invalid_arguments_are_a_usage_error(
    augment: RunAugmenter,
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    named: str,
) -> None:
    """Exit code 2, one line that names the argument, and nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    result = augment(*args, "--target", "127.0.0.1:1")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert named in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_target_is_required(augment: RunAugmenter, source: Path, tmp_path: Path) -> None:
    """Only a dry run needs no --target."""
    result = augment(source, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (
        2,
        "augmenter: --target is required (the proxy's HOST:PORT)\n",
    )


@pytest.mark.parametrize(
    ("source_text", "sink_text", "expected"),
    [
        ("s3://b/raw/", "s3://b/mod/", (S3Uri("b", "raw/"), S3Uri("b", "mod/"), None)),
        ("s3://b/raw", "s3://b/raw-mod", (S3Uri("b", "raw/"), S3Uri("b", "raw-mod/"), None)),
        ("s3://b", "s3://c", (S3Uri("b", ""), S3Uri("c", ""), None)),
        ("s3://b/raw/x.jsonl.gz", "s3://b/mod/", (S3Uri("b", "raw/"), S3Uri("b", "mod/"), "x.jsonl.gz")),
        ("s3://b/x.jsonl", "/nowhere/y.jsonl", (S3Uri("b", ""), LocalPath(Path("/nowhere")), "y.jsonl")),
        ("s3://b/raw.jsonl/", "s3://b/mod/", (S3Uri("b", "raw.jsonl/"), S3Uri("b", "mod/"), None)),
    ],
)
def test_input_and_output_are_parsed_as_written(
    source_text: str, sink_text: str, expected: tuple[object, ...]
) -> None:
    """A prefix, a bucket or a key, by its form. Names with a common prefix are distinct."""
    run_paths = resolve_paths(source_text, sink_text, None)
    assert (run_paths.source, run_paths.sink, run_paths.output_name) == expected
    assert run_paths.rejects == run_paths.sink.join("_rejects/")


@pytest.mark.parametrize(
    ("source_text", "sink_text", "rejects"),
    [
        ("s3://b/raw/", "s3://b/raw/mod/", None),
        ("s3://b/raw", "s3://b/raw/", None),
        ("s3://b", "s3://b/mod/", None),
        ("s3://b/raw/", "s3://b/mod/", "s3://b/raw/_rejects"),
        ("s3://b/x.jsonl", "s3://b/", None),
        ("s3://b/mod/raw/", "s3://b/mod/", None),
    ],
)
def test_nested_prefixes_are_a_usage_error(source_text: str, sink_text: str, rejects: str | None) -> None:
    """Prefixes are compared by their segments, as folders are."""
    with pytest.raises(UsageError):
        resolve_paths(source_text, sink_text, rejects)


@pytest.mark.parametrize(
    "name", ["../x.jsonl", "a/../../x.jsonl", "/etc/x.jsonl", "a//x.jsonl", "./x.jsonl", "a\0b"]
)
async def test_names_never_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """No name of an object, however odd, can create a file outside the output folder."""
    store = LocalStore(tmp_path / "out")
    await store.check_writable()
    with pytest.raises(StorageError):
        await store.create(name, FileInfo(name, 1, "v", 0)).__aenter__()
    files = await asyncio.to_thread(lambda: [path for path in tmp_path.rglob("*") if path.is_file()])
    assert files == []


async def test_folder_at_the_path_of_an_output_is_reported(tmp_path: Path) -> None:
    """One key may be a prefix of another. The folder that this creates is not another process's output."""
    item = FileInfo("a.jsonl", 1, "1", 1)
    async with LocalStore(tmp_path).create("a.jsonl", item, expected_version=ABSENT) as upload:
        (tmp_path / "a.jsonl").mkdir()
        with pytest.raises(StorageError, match="a folder stands there"):
            await upload.complete()


def test_failed_file_is_one_line_whatever_its_name(augment: RunAugmenter, tmp_path: Path) -> None:
    """Control characters are escaped, so that no part of a name looks like a line of its own."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\naugmenter: \x1b[31mb\r.jsonl").write_bytes(b"bad\n")
    result = augment(tmp_path / "in", tmp_path / "out", "--target", "127.0.0.1:1")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "in/a\\naugmenter: \\x1b[31mb\\r.jsonl: no line can be augmented" in result.stderr


def test_dangling_link_is_ignored(augment: RunAugmenter, source: Path, tmp_path: Path) -> None:
    """The other files are found."""
    (source / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    result = augment(source, tmp_path / "out", "--dry-run")
    assert (result.exit_code, "1 to do" in result.stdout) == (0, True)


def test_help_names_environment_variables() -> None:
    """`python -m services.augmenter run --help` names every flag with its variable."""
    result = run_command("services.augmenter", "run", "--help", env={"COLUMNS": "200"})
    assert result.returncode == 0
    assert "AUGMENTER_RETRY_BUDGET" in result.stdout
    assert "AUGMENTER_INPUT" in result.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"AWS_ENDPOINT_URL": "nonsense"},
        {"AWS_PROFILE": "nope"},
        {"AWS_DEFAULT_REGION": "bad region"},
    ],
)
def test_invalid_aws_settings_are_one_line(
    augment: RunAugmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """Exit code 1 and one line, as for a missing bucket."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = augment("s3://bucket/raw/", str(tmp_path / "out"), "--target", "127.0.0.1:1")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "Traceback" not in result.stderr


def test_modules_for_s3_and_terminals_are_not_imported_at_start() -> None:
    """Importing them would take longer than augmenting 100,000 lines."""
    code = "import sys, services.augmenter.cli; print(*{'aiobotocore', 'aiohttp', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
