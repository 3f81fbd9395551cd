"""Tests of usage errors: exit code 2 and one line, before anything is read."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.augmenter.conftest import RunAugmenter
from tests.support.postings import make_posting
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
    """Invalid or conflicting arguments end with exit code 2 and one line that names the argument."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    result = augment(*args, "--target", "127.0.0.1:1")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert named in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_target_is_required(augment: RunAugmenter, source: Path, tmp_path: Path) -> None:
    """A run without --target is a usage error, unless it is a dry run."""
    result = augment(source, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (
        2,
        "augmenter: --target is required (the proxy's HOST:PORT)\n",
    )


def test_failed_file_is_one_line_whatever_its_name(augment: RunAugmenter, tmp_path: Path) -> None:
    """Control characters in the name of a failed file are escaped, so that its error is one line."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a\naugmenter: \x1b[31mb\r.jsonl").write_bytes(b"bad\n")
    result = augment(tmp_path / "in", tmp_path / "out", "--target", "127.0.0.1:1")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "in/a\\naugmenter: \\x1b[31mb\\r.jsonl: no line can be augmented" in result.stderr


def test_dangling_link_is_ignored(augment: RunAugmenter, source: Path, tmp_path: Path) -> None:
    """A dangling link in the input folder is ignored, and the other files are found."""
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
    """Invalid AWS settings end the run with exit code 1 and one line."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = augment("s3://bucket/raw/", str(tmp_path / "out"), "--target", "127.0.0.1:1")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "Traceback" not in result.stderr


def test_modules_for_s3_and_terminals_are_not_imported_at_start() -> None:
    """Modules that only S3 or a terminal needs are not imported by a run without them.

    Importing them would take longer than augmenting 100,000 lines.
    """
    code = "import sys, services.augmenter.cli; print(*{'aiobotocore', 'aiohttp', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
