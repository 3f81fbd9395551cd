"""Tests of INPUT without a file to augment, and of names that are ignored."""

import signal
from pathlib import Path

import pytest

from tests.integration.augmenter.conftest import MakeQueue, RunAugmenter, RunningStub, sqs_run_args
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.postings import make_posting
from tests.support.processes import run_command
from tests.support.s3_bucket import Bucket
from tests.support.sqs_server import object_created_event


def test_files_with_known_suffixes_are_read_in_any_case(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """Files with a known suffix, in any case, are read. The summary counts the others by suffix."""
    source = tmp_path / "in"
    (source / "_rejects").mkdir(parents=True)
    names = ["1.jsonl", "2.ndjson", "3.jl", "4.json", "5.JSONL", "6.NdJson"]
    for name in [*names, "a.csv", "b.CSV", "c.parquet", ".d.jsonl", "_rejects/e.jsonl", "f"]:
        (source / name).write_bytes(make_posting())
    result = augment(source, tmp_path / "out", "--target", stub.target, "--summary-json", tmp_path / "s.json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    ignored = {".csv": 2, ".parquet": 1, "hidden": 1, "_rejects": 1, "no suffix": 1}
    assert read_summary(tmp_path / "s.json")["ignored"] == ignored
    assert "Ignored  2 .csv, " in result.stdout


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--shard", "0/3"]])
def test_folder_without_a_file_is_an_error(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, flags: list[str]
) -> None:
    """A folder without an input file ends the run with exit code 1, unless --ok-empty is set."""
    source = tmp_path / "in"
    source.mkdir()
    args = (source, tmp_path / "out", "--target", stub.target, *flags)
    result = augment(*args)
    assert (result.exit_code, result.stderr) == (
        1,
        f"augmenter: {source}: nothing to augment: no file is there\n",
    )
    for name in ("a.csv", "b.csv", "c.json.bz2", ".d.jsonl"):
        (source / name).write_bytes(make_posting())
    result = augment(*args)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(
        f"augmenter: {source}: nothing to augment: no name ends in one of .jsonl, "
    )
    assert result.stderr.endswith("ignored: 2 .csv, 1 .json.bz2, 1 hidden\n")
    result = augment(*args, "--ok-empty")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "2 .csv" in result.stdout


def test_shard_without_a_file_succeeds(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """A shard without a file of its own succeeds, and so does a run that finds all files done."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(make_posting())
    args = (tmp_path / "in", tmp_path / "out", "--target", stub.target)
    assert [augment(*args, "--shard", f"{i}/3").exit_code for i in range(3)] == [0, 0, 0]
    assert augment(*args).exit_code == 0


@pytest.mark.slow
def test_empty_prefix_is_reported_with_a_hint(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """For a wrong or partial prefix, the error line suggests prefixes that exist."""
    bucket.put("job-postings-raw/1.jsonl", make_posting())
    bucket.put("exports/2024/a.csv", b"company,title")
    bucket.put("exports/2024/b.NDJSON", make_posting())
    bucket.put("only/a.csv", b"company,title")
    bucket.put("only/", b"")

    def run(key: str, *args: str) -> tuple[int, str]:
        result = augment(
            f"s3://{bucket.name}/{key}",
            f"s3://{bucket.name}-out/x/" if args else f"s3://{bucket.name}/mod/",
            "--endpoint-url",
            bucket.endpoint_url,
            "--target",
            stub.target,
            *args,
        )
        assert result.stderr.count("\n") <= 1
        return result.exit_code, result.stderr

    uri = f"s3://{bucket.name}"
    for key in ("job-post", "job-postings"):
        code, err = run(key)
        assert code == 1
        assert (
            f"{uri}/{key}/: nothing to augment: no file is there; did you mean {uri}/job-postings-raw/?"
            in err
        )
    code, err = run("exports/2023/")
    assert code == 1
    assert f"; {uri}/exports/ has {uri}/exports/2024/" in err
    code, err = run("nowhere/at/all/")
    assert code == 1
    assert f"; {uri}/ has {uri}/exports/, {uri}/job-postings-raw/, {uri}/only/" in err
    code, err = run("job-postings-raw/1.jsonl/")
    assert code == 1
    assert f"did you mean {uri}/job-postings-raw/1.jsonl?" in err
    code, err = run("exports/2024/a.csv")
    assert code == 2
    assert err.startswith(f"augmenter: {uri}/exports/2024/a.csv: the name must end in one of .jsonl, ")
    code, err = run("only/")
    assert code == 1
    assert "no name ends in one of" in err
    assert err.endswith("ignored: 1 .csv\n")
    assert run("exports/2024/b.NDJSON") == (0, "")
    assert bucket.get("mod/b.NDJSON").startswith(make_posting()[:-1])
    assert run("exports/2024/") == (0, "")


def test_help_names_known_suffixes_and_excluded_names() -> None:
    """The help of `augmenter run` lists the suffixes that are read and the names that are not."""
    result = run_command("services.augmenter", "run", "--help", env={"COLUMNS": "1000"})
    help_text = " ".join(result.stdout.split())
    assert "end in .jsonl, .ndjson, .jl, .json, each also with .gz or .zst, in any case" in help_text
    assert "begins with a dot or is _rejects" in help_text


@pytest.mark.slow
def test_watch_logs_once_that_it_waits_for_files(stub: RunningStub, tmp_path: Path) -> None:
    """`--watch` on an empty folder logs one warning, at the first listing, and counts ignored names once."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").touch()
    args = (
        tmp_path / "in",
        tmp_path / "out",
        "--target",
        stub.target,
        "--watch",
        "--poll-interval",
        "50ms",
        "--summary-json",
        tmp_path / "s.json",
    )
    with augmenter_process(*args) as process:
        assert process.stderr
        warning = process.stderr.readline()
        (tmp_path / "in" / "b.jsonl").write_bytes(make_posting())
        while not (tmp_path / "out" / "b.jsonl").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert "nothing to augment" in warning
    assert "1 .csv; waiting for files" in warning
    assert "nothing to augment" not in err
    assert read_summary(tmp_path / "s.json")["ignored"] == {".csv": 1}


@pytest.mark.slow
def test_message_about_ignored_name_is_deleted_and_counted(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue, tmp_path: Path
) -> None:
    """A queue message about a key that is not an input file is deleted, and counted as ignored."""
    queue = make_queue()
    queue.send(object_created_event(bucket.name, "raw/notes.txt"))
    result = augment(*sqs_run_args(bucket, queue, stub.target), "--summary-json", tmp_path / "s.json")
    assert result.exit_code == 0
    assert "1 .txt" in result.stdout
    assert read_summary(tmp_path / "s.json")["ignored"] == {".txt": 1}
