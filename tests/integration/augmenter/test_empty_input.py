"""INPUT without a file to augment, and names that are ignored."""

import signal
from pathlib import Path

import pytest

from services.common.storage.input_listing import NameCounts, ignored_suffix
from tests.integration.augmenter.conftest import (
    MakeQueue,
    RunAugmenter,
    RunningStub,
    make_posting,
    sqs_run_args,
)
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.processes import run_command
from tests.support.s3_bucket import Bucket
from tests.support.sqs_server import object_created_event


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.csv", ".csv"),
        ("deep/a.CSV", ".csv"),
        ("a.csv.gz", ".csv.gz"),
        ("a.jsonl.bz2", ".jsonl.bz2"),
        ("a.gz", ".gz"),
        ("README", "no suffix"),
        ("a.1714605540", "other"),
        ("a.a-very-long-suffix", "other"),
        (".hidden.jsonl", "hidden"),
        (".git/a.jsonl", "hidden"),
        ("_rejects/a.jsonl", "_rejects"),
        ("a.jsonl.reasons.jsonl", ".reasons.jsonl"),
    ],
)
def test_ignored_names_are_told_by_suffix(name: str, suffix: str) -> None:
    """Whatever the case; compressed ones by both suffixes."""
    assert ignored_suffix(name) == suffix


def test_suffixes_are_bounded() -> None:
    """However many suffixes there are, the summary has a few; markers of folders are no names."""
    listing = NameCounts()
    for number in range(100):
        listing.count_ignored(f"a.x{number}")
    listing.count_ignored("folder/")
    listing.count_ignored("")
    assert (len(listing.ignored), listing.ignored["other"], listing.ignored.total()) == (21, 80, 100)


def test_every_usual_name_is_read(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """Also in capitals; the others are counted by suffix, for people and machines."""
    source = tmp_path / "in"
    (source / "_rejects").mkdir(parents=True)
    names = ["1.jsonl", "2.ndjson", "3.jl", "4.json", "5.JSONL", "6.NdJson"]
    for name in [*names, "a.csv", "b.CSV", "c.parquet", ".d.jsonl", "_rejects/e.jsonl", "f"]:
        (source / name).write_bytes(make_posting())
    ended = augment(source, tmp_path / "out", "--target", stub.target, "--summary-json", tmp_path / "s.json")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    ignored = {".csv": 2, ".parquet": 1, "hidden": 1, "_rejects": 1, "no suffix": 1}
    assert read_summary(tmp_path / "s.json")["ignored"] == ignored
    assert "Ignored  2 .csv, " in ended.stdout


@pytest.mark.parametrize("how", [[], ["--dry-run"], ["--shard", "0/3"]])
def test_folder_without_a_file_is_an_error(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, how: list[str]
) -> None:
    """Exit code 1 and one line that says what was ignored; --ok-empty accepts it."""
    source = tmp_path / "in"
    source.mkdir()
    args = (source, tmp_path / "out", "--target", stub.target, *how)
    ended = augment(*args)
    assert (ended.exit_code, ended.stderr) == (
        1,
        f"augmenter: {source}: nothing to augment: no file is there\n",
    )
    for name in ("a.csv", "b.csv", "c.json.bz2", ".d.jsonl"):
        (source / name).write_bytes(make_posting())
    ended = augment(*args)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith(
        f"augmenter: {source}: nothing to augment: no name ends in one of .jsonl, "
    )
    assert ended.stderr.endswith("ignored: 2 .csv, 1 .json.bz2, 1 hidden\n")
    ended = augment(*args, "--ok-empty")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "2 .csv" in ended.stdout


def test_files_of_other_shards_are_files(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """A shard without a file of its own has not failed, and neither has a run that finds all done."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(make_posting())
    args = (tmp_path / "in", tmp_path / "out", "--target", stub.target)
    assert [augment(*args, "--shard", f"{i}/3").exit_code for i in range(3)] == [0, 0, 0]
    assert augment(*args).exit_code == 0


@pytest.mark.slow
def test_prefix_without_an_object_is_hinted(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """A wrong or partial prefix, a single key, and one whose name says no format."""
    bucket.put("job-postings-raw/1.jsonl", make_posting())
    bucket.put("exports/2024/a.csv", b"company,title")
    bucket.put("exports/2024/b.NDJSON", make_posting())
    bucket.put("only/a.csv", b"company,title")
    bucket.put("only/", b"")

    def run(key: str, *args: str) -> tuple[int, str]:
        ended = augment(
            f"s3://{bucket.name}/{key}",
            f"s3://{bucket.name}-out/x/" if args else f"s3://{bucket.name}/mod/",
            "--endpoint-url",
            bucket.endpoint_url,
            "--target",
            stub.target,
            *args,
        )
        assert ended.stderr.count("\n") <= 1
        return ended.exit_code, ended.stderr

    at = f"s3://{bucket.name}"
    for key in ("job-post", "job-postings"):
        code, err = run(key)
        assert code == 1
        assert (
            f"{at}/{key}/: nothing to augment: no file is there; did you mean {at}/job-postings-raw/?" in err
        )
    code, err = run("exports/2023/")
    assert code == 1
    assert f"; {at}/exports/ has {at}/exports/2024/" in err
    code, err = run("nowhere/at/all/")
    assert code == 1
    assert f"; {at}/ has {at}/exports/, {at}/job-postings-raw/, {at}/only/" in err
    code, err = run("job-postings-raw/1.jsonl/")
    assert code == 1
    assert f"did you mean {at}/job-postings-raw/1.jsonl?" in err
    code, err = run("exports/2024/a.csv")
    assert code == 2
    assert err.startswith(f"augmenter: {at}/exports/2024/a.csv: the name must end in one of .jsonl, ")
    code, err = run("only/")
    assert code == 1
    assert "no name ends in one of" in err
    assert err.endswith("ignored: 1 .csv\n")
    assert run("exports/2024/b.NDJSON") == (0, "")
    assert bucket.get("mod/b.NDJSON").startswith(make_posting()[:-1])
    assert run("exports/2024/") == (0, "")


def test_help_names_what_is_never_read() -> None:
    """The suffixes, and the names that are never touched."""
    ended = run_command("services.augmenter", "run", "--help", env={"COLUMNS": "1000"})
    told = " ".join(ended.stdout.split())
    assert "end in .jsonl, .ndjson, .jl, .json, each also with .gz or .zst, in any case" in told
    assert "begins with a dot or is _rejects" in told


@pytest.mark.slow
def test_watch_says_that_it_waits(stub: RunningStub, tmp_path: Path) -> None:
    """One warning, at the first listing only, and the names that it ignored are counted once."""
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
def test_queue_counts_names_that_are_ignored(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue, tmp_path: Path
) -> None:
    """A message about a key in INPUT that is no input is deleted, but not without a word."""
    queue = make_queue()
    queue.send(object_created_event(bucket.name, "raw/notes.txt"))
    ended = augment(*sqs_run_args(bucket, queue, stub.target), "--summary-json", tmp_path / "s.json")
    assert ended.exit_code == 0
    assert "1 .txt" in ended.stdout
    assert read_summary(tmp_path / "s.json")["ignored"] == {".txt": 1}
