"""Tests of `augmenter run` on a real S3 server."""

import gzip
import os
import random
from pathlib import Path

import pytest

from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.postings import make_posting
from tests.support.s3_bucket import Bucket


def _expected(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


def test_prefix_is_augmented_into_another_prefix(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """Outputs keep their names, have their input's ETag as metadata, and are skipped by the next run.

    Rejects are written beside the outputs.
    """
    lines = [make_posting(id=i) for i in range(100)]
    plain = bucket.put("raw/1.jsonl", b"\n".join(lines))
    compressed = bucket.put("raw/deep/2.jsonl.gz", gzip.compress(b"bad\n" + b"\n".join(lines)))
    bucket.put("raw/readme.txt", b"not ours")
    bucket.put("raw-not/3.jsonl", b"not ours")
    uri = f"s3://{bucket.name}"
    args = (f"{uri}/raw/", f"{uri}/mod", "--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    result = augment(*args)
    assert (result.exit_code, result.stderr) == (3, "")
    assert "200 augmented + 1 rejected" in result.stdout
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == [
        "mod/1.jsonl",
        "mod/_rejects/deep/2.jsonl.gz",
        "mod/_rejects/deep/2.jsonl.gz.reasons.jsonl",
        "mod/deep/2.jsonl.gz",
    ]
    assert bucket.get("mod/1.jsonl") == _expected(lines)
    assert gzip.decompress(bucket.get("mod/deep/2.jsonl.gz")) == _expected(lines)
    assert gzip.decompress(bucket.get("mod/_rejects/deep/2.jsonl.gz")) == b"bad\n"
    assert (bucket.input_etag("mod/1.jsonl"), bucket.input_etag("mod/deep/2.jsonl.gz")) == (plain, compressed)
    assert "0 done, 2 skipped" in augment(*args).stdout
    bucket.put("raw/deep/2.jsonl.gz", gzip.compress(lines[0]))
    result = augment(*args)
    assert (result.exit_code, "1 done, 1 skipped" in result.stdout) == (0, True)
    assert not [key for key in bucket.list_keys() if "_rejects" in key]


def test_input_and_output_may_be_bucket_and_folder(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """INPUT and OUTPUT may be bucket and folder in both directions, and finished files are skipped."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    upload_args = (tmp_path / "a.jsonl", f"s3://{bucket.name}/up/b.jsonl", *common)
    assert augment(*upload_args).exit_code == 0
    assert bucket.get("up/b.jsonl") == _expected([make_posting()])
    assert "1 skipped" in augment(*upload_args).stdout
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert "1 done" in augment(*upload_args).stdout
    download_args = (f"s3://{bucket.name}/up/", tmp_path / "down", *common)
    assert augment(*download_args).exit_code == 0
    assert (tmp_path / "down" / "b.jsonl").read_bytes() == _expected([make_posting()])
    assert "1 skipped" in augment(*download_args).stdout


_ODD_NAMES = (
    " a .jsonl",
    "a%2Fb.jsonl",
    "a%.jsonl",
    "a+b c.jsonl",
    "q'\"uote.jsonl",
    "<&amp;>.jsonl",
    "=?&#;,:@$!*().jsonl",
    "a/%20/+/é.jsonl",
    "e\u0301.jsonl",
    "[x]{y}^`|~.jsonl",
    "tab\t.jsonl",
    "\U0001f600.jsonl",
)


@pytest.mark.slow
def test_names_with_special_characters_are_kept(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """Names with characters that URLs, XML or shells treat specially are kept in the output."""
    for name in _ODD_NAMES:
        bucket.put(f"raw/{name}", make_posting())
    args = (
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert f"{len(_ODD_NAMES)} done, 0 skipped" in augment(*args).stdout
    assert {key for key in bucket.list_keys() if key.startswith("mod/")} == {
        f"mod/{name}" for name in _ODD_NAMES
    }
    assert f"0 done, {len(_ODD_NAMES)} skipped" in augment(*args).stdout


@pytest.mark.slow
def test_large_object_is_uploaded_in_parts(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """An output larger than a part is stored whole, with its input's ETag as metadata."""
    lines = [make_posting(id=i, text="x" * 1_000) for i in range(20_000)]
    etag = bucket.put("raw/big.jsonl", b"\n".join(lines))
    result = augment(
        f"s3://{bucket.name}/raw/big.jsonl",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert result.exit_code == 0
    assert bucket.get("mod/big.jsonl") == _expected(lines)
    assert bucket.input_etag("mod/big.jsonl") == etag


@pytest.mark.slow
def test_failed_file_leaves_no_object(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """A file that fails after its first parts leaves neither an object nor parts."""
    lines = b"\n".join(make_posting(id=i, text="x" * 1_000) for i in range(20_000))
    bucket.put("raw/cut.jsonl.gz", gzip.compress(lines, 1)[:-9])
    noise = b"\n".join(make_posting(id=i, text=random.Random(i).randbytes(600).hex()) for i in range(20_000))
    bucket.put("raw/noise.jsonl.gz", gzip.compress(noise, 1)[:-9])
    result = augment(
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert result.exit_code == 1
    assert sorted(result.stderr.splitlines()) == [
        f"augmenter: s3://{bucket.name}/raw/{name}.jsonl.gz: the compressed input is cut short"
        for name in ("cut", "noise")
    ]
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == []
    assert bucket.count_unfinished_uploads() == 0


def test_missing_bucket_or_key_is_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """A missing bucket or key ends the run with exit code 1 and one line that names it."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    for source, sink, message in (
        ("s3://no-such-bucket/raw/", tmp_path / "out", "s3://no-such-bucket/raw/: the bucket does not exist"),
        (tmp_path / "a.jsonl", "s3://no-such-bucket/", "s3://no-such-bucket/: the bucket does not exist"),
        (f"s3://{bucket.name}/no.jsonl", f"{tmp_path}/x/", f"s3://{bucket.name}/no.jsonl: does not exist"),
    ):
        result = augment(source, sink, *common)
        assert (result.exit_code, result.stderr) == (1, f"augmenter: {message}\n")


def test_wrong_or_no_credentials_are_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong or missing credentials end the run with exit code 1 and one line that names the bucket."""
    args = (f"s3://{bucket.name}/raw/", tmp_path / "out", "--target", stub.target)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"augmenter: s3://{bucket.name}/raw/: ")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    result = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert result.exit_code == 1
    assert result.stderr == f"augmenter: s3://{bucket.name}/raw/: Unable to locate credentials\n"
