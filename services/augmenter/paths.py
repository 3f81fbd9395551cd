"""INPUT and OUTPUT as the user wrote them, and whether they go together. No network."""

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
    """A local folder or file; absolute."""

    path: Path

    def parts(self) -> tuple[str, ...]:
        """What says where it is, symbolic links resolved."""
        return ("local", *Path(os.path.realpath(self.path)).parts)

    def join(self, name: str) -> "LocalPath":
        """The place of `name` in this folder."""
        return LocalPath(self.path / name)

    def split(self) -> tuple["LocalPath", str]:
        """The folder that it is in, and its name."""
        return LocalPath(self.path.parent), self.path.name


@dataclass(frozen=True, slots=True)
class S3Uri:
    """A prefix of a bucket ("" or ending in "/"), or one key.

    `bucket` may also be the ARN of an access point, or Ceph's `tenant:bucket`.
    """

    bucket: str
    key: str

    @property
    def is_access_point(self) -> bool:
        """Whether the bucket is behind an access point (or its alias), and its own name is not known."""
        return self.bucket.startswith("arn:") or self.bucket.endswith("-s3alias")

    @property
    def has_tenant(self) -> bool:
        """Whether the bucket is one of Ceph's, named with its tenant."""
        return ":" in self.bucket and not self.is_access_point

    def parts(self) -> tuple[str, ...]:
        """What says where it is."""
        return ("s3", self.bucket, *self.key.rstrip("/").split("/")) if self.key else ("s3", self.bucket)

    def join(self, name: str) -> "S3Uri":
        """The place of `name` under this prefix."""
        return S3Uri(self.bucket, self.key + name)

    def split(self) -> tuple["S3Uri", str]:
        """The prefix that it is under, and its name."""
        folder, slash, name = self.key.rpartition("/")
        return S3Uri(self.bucket, folder + slash), name


StoragePath: TypeAlias = LocalPath | S3Uri


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Folders, and the two names when INPUT is one file (`output_name` is then where it goes)."""

    source: StoragePath
    sink: StoragePath
    rejects: StoragePath
    input_name: str | None
    output_name: str | None


def resolve_paths(input_text: str, output_text: str, rejects_text: str | None) -> RunPaths:
    """What INPUT, OUTPUT and --rejects mean together. Raises UsageError, or StoreError for no INPUT."""
    source, input_name = _resolve_source(input_text)
    sink, output_name = _resolve_sink(output_text, input_name)
    rejects = _parse_folder(rejects_text) if rejects_text else sink.join(f"{REJECTS_FOLDER}/")
    made = RunPaths(source, sink, rejects, input_name, output_name)
    _check_disjoint(made, input_text, output_text)
    return made


def is_inside(inner: StoragePath, outer: StoragePath) -> bool:
    """Whether `inner` is `outer` or in it."""
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
    place = _parse(text)
    if isinstance(place, S3Uri) and place.key and not place.key.endswith("/"):
        return S3Uri(place.bucket, place.key + "/")
    return place


def _resolve_source(text: str) -> tuple[StoragePath, str | None]:
    place = _parse(text)
    if isinstance(place, S3Uri):
        if place.key.endswith("/") or format_for_name(place.key) is None:
            return _parse_folder(text), None
        return place.split()
    if place.path.is_dir():
        return place, None
    if not place.path.is_file():
        raise StorageError(uri=text, reason="no such file or folder")
    if format_for_name(place.path.name) is None:
        message = f"{text}: the name must end in one of {SUFFIX_HELP}"
        raise UsageError(message)
    return place.split()


def _resolve_sink(text: str, input_name: str | None) -> tuple[StoragePath, str | None]:
    place = _parse(text)
    if text.endswith("/") or (isinstance(place, S3Uri) and not place.key):
        return place, input_name
    if isinstance(place, LocalPath) and place.path.is_dir():
        return place, input_name
    if input_name is None:
        if isinstance(place, LocalPath) and place.path.exists():
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
    return place.split()


def _check_disjoint(run_paths: RunPaths, input_text: str, output_text: str) -> None:
    """Nothing that is written may be, or be found as, something that is read."""
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
    read = run_paths.source.join(run_paths.input_name).parts()
    written = run_paths.sink.join(run_paths.output_name).parts()
    if written == read:
        message = f"OUTPUT {output_text} is INPUT {input_text}"
        raise UsageError(message)
    if run_paths.rejects.join(run_paths.input_name).parts() in {read, written}:
        raise UsageError("--rejects is the folder of INPUT or OUTPUT: a file would be overwritten")
