"""INPUT and OUTPUT as the user wrote them, and whether they go together. No network."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from services.common.codec import NAMES, format_of
from services.common.errors import UsageError
from services.common.file_names import REJECTS_FOLDER
from services.common.storage.errors import StoreError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ACCESS_POINT = re.compile(
    r"(arn:[a-z0-9-]+:s3:[a-z0-9-]+:\d{12}:accesspoint[/:][a-z0-9][a-z0-9-]{1,61}[a-z0-9])(?:/(.*))?",
    re.ASCII | re.DOTALL,
)
_TENANT = re.compile(r"\w*:[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A local folder or file; absolute."""

    path: Path

    def parts(self) -> tuple[str, ...]:
        """What says where it is, symbolic links resolved."""
        return ("local", *Path(os.path.realpath(self.path)).parts)

    def joined(self, name: str) -> "LocalPlace":
        """The place of `name` in this folder."""
        return LocalPlace(self.path / name)

    def split(self) -> tuple["LocalPlace", str]:
        """The folder that it is in, and its name."""
        return LocalPlace(self.path.parent), self.path.name


@dataclass(frozen=True, slots=True)
class S3Place:
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

    def joined(self, name: str) -> "S3Place":
        """The place of `name` under this prefix."""
        return S3Place(self.bucket, self.key + name)

    def split(self) -> tuple["S3Place", str]:
        """The prefix that it is under, and its name."""
        folder, slash, name = self.key.rpartition("/")
        return S3Place(self.bucket, folder + slash), name


Place: TypeAlias = LocalPlace | S3Place


@dataclass(frozen=True, slots=True)
class Plan:
    """Folders, and the two names when INPUT is one file (`output_name` is then where it goes)."""

    source: Place
    sink: Place
    rejects: Place
    input_name: str | None
    output_name: str | None


def plan(input_text: str, output_text: str, rejects_text: str | None) -> Plan:
    """What INPUT, OUTPUT and --rejects mean together. Raises UsageError, or StoreError for no INPUT."""
    source, input_name = _source(input_text)
    sink, output_name = _sink(output_text, input_name)
    rejects = _folder(rejects_text) if rejects_text else sink.joined(f"{REJECTS_FOLDER}/")
    made = Plan(source, sink, rejects, input_name, output_name)
    _check_apart(made, input_text, output_text)
    return made


def is_inside(inner: Place, outer: Place) -> bool:
    """Whether `inner` is `outer` or in it."""
    return inner.parts()[: len(outer.parts())] == outer.parts()


def _parse(text: str) -> Place:
    if not text:
        raise UsageError("INPUT and OUTPUT must not be empty")
    scheme = _SCHEME.match(text)
    if scheme is None:
        return LocalPlace(Path(text).absolute())
    bucket, _, key = text[scheme.end() :].partition("/")
    if scheme[1] != "s3" or not bucket:
        message = f"{text}: neither s3://BUCKET/PREFIX/ nor a local path"
        raise UsageError(message)
    if bucket.startswith("arn:"):
        return _access_point(text, text[scheme.end() :])
    if ":" in bucket and not _TENANT.fullmatch(bucket):
        message = f"{text}: {bucket!r} is neither a bucket's name nor TENANT:BUCKET"
        raise UsageError(message)
    return S3Place(bucket, key)


def _access_point(text: str, rest: str) -> S3Place:
    found = _ACCESS_POINT.fullmatch(rest)
    if not found:
        message = (
            f"{text}: this ARN is not served, only s3://arn:PARTITION:s3:REGION:ACCOUNT:accesspoint/NAME/"
            "PREFIX/ (no bucket's, multi-region access point's, Outposts' or Object Lambda's)"
        )
        raise UsageError(message)
    return S3Place(found[1], found[2] or "")


def _folder(text: str) -> Place:
    place = _parse(text)
    if isinstance(place, S3Place) and place.key and not place.key.endswith("/"):
        return S3Place(place.bucket, place.key + "/")
    return place


def _source(text: str) -> tuple[Place, str | None]:
    place = _parse(text)
    if isinstance(place, S3Place):
        if place.key.endswith("/") or format_of(place.key) is None:
            return _folder(text), None
        return place.split()
    if place.path.is_dir():
        return place, None
    if not place.path.is_file():
        raise StoreError(place=text, reason="no such file or folder")
    if format_of(place.path.name) is None:
        message = f"{text}: the name must end in one of {NAMES}"
        raise UsageError(message)
    return place.split()


def _sink(text: str, input_name: str | None) -> tuple[Place, str | None]:
    place = _parse(text)
    if text.endswith("/") or (isinstance(place, S3Place) and not place.key):
        return place, input_name
    if isinstance(place, LocalPlace) and place.path.is_dir():
        return place, input_name
    if input_name is None:
        if isinstance(place, LocalPlace) and place.path.exists():
            message = f"{text}: a file, but INPUT is a folder"
            raise UsageError(message)
        if format_of(text):
            message = f"{text}: the name of a file, but INPUT is a folder (end OUTPUT in / if it is one too)"
            raise UsageError(message)
        return _folder(text), None
    wanted = format_of(input_name)
    if format_of(text) is not wanted:
        names = wanted.names if wanted else NAMES
        message = f"{text}: must end in one of {names} as INPUT does, or in / for a folder"
        raise UsageError(message)
    return place.split()


def _check_apart(made: Plan, input_text: str, output_text: str) -> None:
    """Nothing that is written may be, or be found as, something that is read."""
    if made.input_name is None or made.output_name is None:
        if is_inside(made.sink, made.source):
            message = f"OUTPUT {output_text} is inside INPUT {input_text}"
            raise UsageError(message)
        if made.input_name is None and is_inside(made.source, made.sink):
            message = f"INPUT {input_text} is inside OUTPUT {output_text}: an output could replace an input"
            raise UsageError(message)
        if is_inside(made.rejects, made.source):
            message = f"--rejects is inside INPUT {input_text}"
            raise UsageError(message)
        if made.rejects.parts() == made.sink.parts():
            raise UsageError("--rejects is OUTPUT: a file would overwrite its own rejects")
        return
    read = made.source.joined(made.input_name).parts()
    written = made.sink.joined(made.output_name).parts()
    if written == read:
        message = f"OUTPUT {output_text} is INPUT {input_text}"
        raise UsageError(message)
    if made.rejects.joined(made.input_name).parts() in {read, written}:
        raise UsageError("--rejects is the folder of INPUT or OUTPUT: a file would be overwritten")
