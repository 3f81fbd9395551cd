"""Parses INPUT, OUTPUT and --rejects, and checks that they do not overlap. No network access."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from services.common.codec import SUFFIX_HELP, format_for_name
from services.common.errors import UsageError
from services.common.file_names import REJECTS_FOLDER
from services.common.storage.errors import StorageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ACCESS_POINT = re.compile(
    r"(arn:[a-z0-9-]+:s3:[a-z0-9-]+:\d{12}:accesspoint[/:][a-z0-9][a-z0-9-]{1,61}[a-z0-9])(?:/(.*))?",
    re.ASCII | re.DOTALL,
)
_TENANT = re.compile(r"\w*:[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalPath:
    """A local folder or file, as an absolute path."""

    path: Path

    def parts(self) -> tuple[str, ...]:
        """Return the path's segments with symbolic links resolved, for comparisons."""
        return ("local", *Path(os.path.realpath(self.path)).parts)

    def join(self, name: str) -> "LocalPath":
        """Return the path of `name` in this folder."""
        return LocalPath(self.path / name)

    def split(self) -> tuple["LocalPath", str]:
        """Return the parent folder and the name in it."""
        return LocalPath(self.path.parent), self.path.name


@dataclass(frozen=True, slots=True)
class S3Uri:
    """A prefix of a bucket (empty, or ending in "/"), or one key.

    `bucket` may also be the ARN of an access point, or Ceph's `tenant:bucket`.
    """

    bucket: str
    key: str

    @property
    def is_access_point(self) -> bool:
        """Return whether this is an access point or its alias, so that the bucket's own name is unknown."""
        return self.bucket.startswith("arn:") or self.bucket.endswith("-s3alias")

    @property
    def has_tenant(self) -> bool:
        """Return whether the bucket is one of Ceph's, named with its tenant."""
        return ":" in self.bucket and not self.is_access_point

    def parts(self) -> tuple[str, ...]:
        """Return the segments of bucket and key, for comparisons."""
        return ("s3", self.bucket, *self.key.rstrip("/").split("/")) if self.key else ("s3", self.bucket)

    def join(self, name: str) -> "S3Uri":
        """Return the URI of `name` under this prefix."""
        return S3Uri(self.bucket, self.key + name)

    def split(self) -> tuple["S3Uri", str]:
        """Return the prefix that contains the key, and the name under it."""
        folder, slash, name = self.key.rpartition("/")
        return S3Uri(self.bucket, folder + slash), name


StoragePath: TypeAlias = LocalPath | S3Uri


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The folders of a run. Both names are set when INPUT is one file, and `output_name` is its output's."""

    source: StoragePath
    sink: StoragePath
    rejects: StoragePath
    input_name: str | None
    output_name: str | None


def resolve_paths(input_text: str, output_text: str, rejects_text: str | None) -> RunPaths:
    """Resolve INPUT, OUTPUT and --rejects together.

    Raises UsageError, or StorageError if INPUT does not exist.
    """
    source, input_name = _resolve_source(input_text)
    sink, output_name = _resolve_sink(output_text, input_name)
    rejects = _parse_folder(rejects_text) if rejects_text else sink.join(f"{REJECTS_FOLDER}/")
    run_paths = RunPaths(source, sink, rejects, input_name, output_name)
    _check_disjoint(run_paths, input_text, output_text)
    return run_paths


def is_inside(inner: StoragePath, outer: StoragePath) -> bool:
    """Return whether `inner` is `outer` or lies in it."""
    return inner.parts()[: len(outer.parts())] == outer.parts()


def _parse(text: str) -> StoragePath:
    if not text:
        raise UsageError("INPUT and OUTPUT must not be empty")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalPath(Path(text).absolute())
    bucket, _, key = text[scheme.end() :].partition("/")
    if scheme[1] != "s3" or not bucket:
        message = f"{text}: neither s3://BUCKET/PREFIX/ nor a local path"
        raise UsageError(message)
    if bucket.startswith("arn:"):
        return _parse_access_point(text, text[scheme.end() :])
    if ":" in bucket and not _TENANT.fullmatch(bucket):
        message = f"{text}: {bucket!r} is neither a bucket's name nor TENANT:BUCKET"
        raise UsageError(message)
    return S3Uri(bucket, key)


def _parse_access_point(text: str, rest: str) -> S3Uri:
    found = _ACCESS_POINT.fullmatch(rest)
    if not found:
        message = (
            f"{text}: this ARN is not served, only s3://arn:PARTITION:s3:REGION:ACCOUNT:accesspoint/NAME/"
            "PREFIX/ (no bucket's, multi-region access point's, Outposts' or Object Lambda's)"
        )
        raise UsageError(message)
    return S3Uri(found[1], found[2] or "")


def _parse_folder(text: str) -> StoragePath:
    location = _parse(text)
    if isinstance(location, S3Uri) and location.key and not location.key.endswith("/"):
        return S3Uri(location.bucket, location.key + "/")
    return location


def _resolve_source(text: str) -> tuple[StoragePath, str | None]:
    location = _parse(text)
    if isinstance(location, S3Uri):
        if location.key.endswith("/") or format_for_name(location.key) is None:
            return _parse_folder(text), None
        return location.split()
    if location.path.is_dir():
        return location, None
    if not location.path.is_file():
        raise StorageError(uri=text, reason="no such file or folder")
    if format_for_name(location.path.name) is None:
        message = f"{text}: the name must end in one of {SUFFIX_HELP}"
        raise UsageError(message)
    return location.split()


def _resolve_sink(text: str, input_name: str | None) -> tuple[StoragePath, str | None]:
    location = _parse(text)
    if text.endswith("/") or (isinstance(location, S3Uri) and not location.key):
        return location, input_name
    if isinstance(location, LocalPath) and location.path.is_dir():
        return location, input_name
    if input_name is None:
        if isinstance(location, LocalPath) and location.path.exists():
            message = f"{text}: a file, but INPUT is a folder"
            raise UsageError(message)
        if format_for_name(text):
            message = f"{text}: the name of a file, but INPUT is a folder (end OUTPUT in / if it is one too)"
            raise UsageError(message)
        return _parse_folder(text), None
    wanted = format_for_name(input_name)
    if format_for_name(text) is not wanted:
        names = wanted.suffix_help if wanted else SUFFIX_HELP
        message = f"{text}: must end in one of {names} as INPUT does, or in / for a folder"
        raise UsageError(message)
    return location.split()


def _check_disjoint(run_paths: RunPaths, input_text: str, output_text: str) -> None:
    """Check that no file that is written can replace, or be listed as, a file that is read."""
    if run_paths.input_name is None or run_paths.output_name is None:
        if is_inside(run_paths.sink, run_paths.source):
            message = f"OUTPUT {output_text} is inside INPUT {input_text}"
            raise UsageError(message)
        if run_paths.input_name is None and is_inside(run_paths.source, run_paths.sink):
            message = f"INPUT {input_text} is inside OUTPUT {output_text}: an output could replace an input"
            raise UsageError(message)
        if is_inside(run_paths.rejects, run_paths.source):
            message = f"--rejects is inside INPUT {input_text}"
            raise UsageError(message)
        if run_paths.rejects.parts() == run_paths.sink.parts():
            raise UsageError("--rejects is OUTPUT: a file would overwrite its own rejects")
        return
    read_parts = run_paths.source.join(run_paths.input_name).parts()
    written_parts = run_paths.sink.join(run_paths.output_name).parts()
    if written_parts == read_parts:
        message = f"OUTPUT {output_text} is INPUT {input_text}"
        raise UsageError(message)
    if run_paths.rejects.join(run_paths.input_name).parts() in {read_parts, written_parts}:
        raise UsageError("--rejects is the folder of INPUT or OUTPUT: a file would be overwritten")
