"""Tests of parsing INPUT, OUTPUT and --rejects."""

from pathlib import Path

import pytest

from services.augmenter.paths import LocalPath, S3Uri, resolve_paths
from services.common.errors import UsageError


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
    """INPUT and OUTPUT are parsed as prefix, bucket, key or path, by how they are written."""
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
    """INPUT, OUTPUT and --rejects must not contain each other, compared by path segments."""
    with pytest.raises(UsageError):
        resolve_paths(source_text, sink_text, rejects)
