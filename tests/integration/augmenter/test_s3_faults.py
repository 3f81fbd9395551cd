"""Tests of each S3 operation that fails, before or after it has its effect.

A file must be whole, or failed and named. One module, since all tests check their outcome by `Files`.
"""

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.common import aws_client
from services.common.storage import s3_conditional, s3_download
from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, RunResult
from tests.support.augmenter_process import augmenter_process
from tests.support.postings import make_posting
from tests.support.redis_server import wait_for
from tests.support.scripted_s3 import ALWAYS, ENVIRONMENT, OPERATIONS, Fault, ScriptedS3, scripted_s3

_BAD = b"not JSON"
_SMALL = [make_posting(id=i) for i in range(50)]
# Two full parts and a smaller one.
_LARGE = [make_posting(id=i, text="x" * 1_000) for i in range(11_000)]
_INPUTS = {"small": _SMALL, "large": _LARGE}
_MULTIPART_OPERATIONS = {
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
}
# How a call fails: the kind, whether the call still has its effect, and how often.
_FAULT_POINTS = [
    ("403", False, ALWAYS),
    ("503", False, 1),
    ("503", False, ALWAYS),
    ("503", True, 1),
    ("reset", False, 1),
    ("reset", True, 1),
    ("reset", False, ALWAYS),
    ("reset", True, ALWAYS),
    ("stall", False, 1),
    ("stall", True, 1),
    ("stall", False, ALWAYS),
]
_NOT_SLOW = {
    ("PutObject", "403", False),
    ("UploadPart", "503", True),
    ("CompleteMultipartUpload", "reset", True),
}


def _cases() -> Iterator[object]:
    for operation, (kind, applied, times) in itertools.product(OPERATIONS, _FAULT_POINTS):
        marks = () if (operation, kind, applied) in _NOT_SLOW else pytest.mark.slow
        name = f"{operation}-{kind}-{'after' if applied else 'before'}-{'once' if times == 1 else 'always'}"
        yield pytest.param(operation, kind, applied, times, marks=marks, id=name)


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow three attempts for each call, with almost no time between them."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("botocore.retryhandler.random", SimpleNamespace(random=lambda: 0.01))
    monkeypatch.setattr(aws_client, "_READ_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(s3_conditional, "_CONFLICT_RETRY_SECONDS", (0.01,) * 3)
    monkeypatch.setattr(s3_download, "_FIRST_RETRY_SECONDS", 0.01)


@pytest.fixture
def s3() -> Iterator[ScriptedS3]:
    """Start a server with one bucket."""
    with scripted_s3() as server:
        yield server


def _augmented(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


class Files:
    """The files of INPUT. All but one have a rejected line, so that there are rejects to be removed."""

    def __init__(self, s3: ScriptedS3, *names: str) -> None:
        self._s3 = s3
        self._names = names
        for name in names:
            s3.put(f"in/{name}.jsonl", b"\n".join([*_INPUTS[name], _BAD]))
        s3.put("in/clean.jsonl.gz", gzip.compress(b"\n".join(_SMALL)))

    def run(self, augment: RunAugmenter, stub: RunningStub, path: Path) -> RunResult:
        """Run the augmenter over the files."""
        path.unlink(missing_ok=True)
        return augment(
            f"s3://{self._s3.bucket}/in/",
            f"s3://{self._s3.bucket}/out/",
            "--target",
            stub.target,
            "--endpoint-url",
            self._s3.url,
            "--summary-json",
            path,
            "--log-level",
            "error",
        )

    def check_contents(self, *, but: set[str]) -> None:
        """Check that every output has all of its lines. Only those of `but` may be missing."""
        for name in self._names:
            output = f"out/{name}.jsonl"
            if output not in self._s3.objects:
                assert f"in/{name}.jsonl" in but
                continue
            assert self._s3.objects[output].data == _augmented(_INPUTS[name])
            assert self._s3.objects[f"out/_rejects/{name}.jsonl"].data == _BAD + b"\n"
            [reason] = self._s3.objects[f"out/_rejects/{name}.jsonl.reasons.jsonl"].data.splitlines()
            assert json.loads(reason)["line"] == len(_INPUTS[name]) + 1
        if "out/clean.jsonl.gz" in self._s3.objects:
            assert gzip.decompress(self._s3.objects["out/clean.jsonl.gz"].data) == _augmented(_SMALL)
        else:
            assert "in/clean.jsonl.gz" in but

    def check_outcome(self, result: RunResult, path: Path) -> None:
        """Check that done files are whole, that failed ones are named, and that the counts add up."""
        # The run ended before its first file.
        if not path.exists():
            assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
            return
        totals = json.loads(path.read_text())
        bucket_uri = f"s3://{self._s3.bucket}/"
        failed = {failure["file"].removeprefix(bucket_uri) for failure in totals["failures"]}
        for name in failed:
            assert (
                sum(
                    line.startswith(f"augmenter: {bucket_uri}{name}: ") for line in result.stderr.splitlines()
                )
                == 1
            )
        assert totals["files"]["done"] + totals["files"]["skipped"] == len(self._names) + 1 - len(failed)
        self.check_contents(but=failed)
        lines = totals["lines"]
        assert lines["in"] == lines["augmented"] + lines["rejected"] + lines["blank"]
        done = [name for name in self._names if f"in/{name}.jsonl" not in failed]
        clean = 0 if "in/clean.jsonl.gz" in failed else len(_SMALL)
        assert lines["augmented"] == sum(len(_INPUTS[name]) for name in done) + clean
        assert result.exit_code == (1 if failed else 3 if done else 0)


@pytest.mark.parametrize(("operation", "kind", "applied", "times"), list(_cases()))
def test_failed_call_fails_its_file_or_is_retried(
    augment: RunAugmenter,
    stub: RunningStub,
    s3: ScriptedS3,
    tmp_path: Path,
    operation: str,
    kind: str,
    applied: bool,
    times: int,
) -> None:
    """When a call fails, its file is whole with its rejects, or failed and processed by the next run."""
    files = Files(s3, "large" if operation in _MULTIPART_OPERATIONS else "small")
    if operation == "HeadObject":
        s3.put("out/small.jsonl", _augmented(_SMALL), headers={"x-amz-meta-input-etag": "of another input"})
        s3.put("out/_rejects/small.jsonl", _BAD + b"\n")
        s3.put("out/_rejects/small.jsonl.reasons.jsonl", b'{"line": 51, "reason": "old"}\n')
    if operation == "GetObject (range)":
        s3.faults.append(Fault("GetObject", "cut", times=1))
    if operation == "AbortMultipartUpload":
        s3.faults.append(Fault("UploadPart", "403"))
    s3.faults.append(Fault(operation, kind, applied=applied, times=times))
    result = files.run(augment, stub, tmp_path / "summary.json")
    assert s3.count_requests(operation) > 0
    files.check_outcome(result, tmp_path / "summary.json")
    if times == 1 and operation != "AbortMultipartUpload":
        # The call was retried.
        assert result.exit_code == 3
    s3.faults.clear()
    next_result = files.run(augment, stub, tmp_path / "summary.json")
    assert next_result.exit_code in {0, 3}
    files.check_contents(but=set())


@pytest.mark.parametrize("key", ["out/_rejects/small.jsonl", ".reasons.jsonl", "out/small.jsonl"])
@pytest.mark.parametrize("kind", ["403", "503"])
def test_output_is_not_written_without_its_rejects(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path, key: str, kind: str
) -> None:
    """If rejects or reasons cannot be written, the output, which marks a done file, is not written."""
    files = Files(s3, "small")
    s3.faults = [Fault("PutObject", kind, key=key)]
    result = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(result, tmp_path / "summary.json")
    assert "out/small.jsonl" not in s3.objects
    assert result.stderr.startswith("augmenter: s3://b/in/small.jsonl: s3://b/out/")


def test_error_in_a_response_of_status_200_fails_the_file(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path
) -> None:
    """If CompleteMultipartUpload fails after its status line, the file fails and has no object."""
    files = Files(s3, "large")
    s3.faults = [Fault("CompleteMultipartUpload", "200")]
    result = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(result, tmp_path / "summary.json")
    assert result.exit_code == 1
    assert "out/large.jsonl" not in s3.objects


@pytest.mark.parametrize("number", [0, 1, 2])
def test_failed_part_fails_its_file(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path, number: int
) -> None:
    """If any part of an upload is rejected, its file fails, and no object is created from the other parts."""
    files = Files(s3, "large")
    s3.faults = [Fault("UploadPart", "403", skip=number)]
    result = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(result, tmp_path / "summary.json")
    assert (result.exit_code, s3.keys("out/large"), s3.uploads) == (1, [], {})


def test_conflict_with_a_concurrent_write_is_retried(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path
) -> None:
    """A response of 409, for a concurrent write of the same key, is retried.

    The concurrent write may be the first attempt of the same upload.
    """
    files = Files(s3, "small")
    s3.faults = [Fault("PutObject", "409", key="out/small", times=2)]
    result = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(result, tmp_path / "summary.json")
    assert result.exit_code == 3


@pytest.mark.slow
def test_old_rejects_left_by_a_killed_run_are_removed_by_overwrite(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path
) -> None:
    """If a run is killed before it removes old rejects, a run with `--overwrite` removes them.

    The new output is whole, so a plain run skips it, as docs/augmenter.md describes. If the rejects were
    removed before the output, a run that is killed in between would lose them.
    """
    files = Files(s3, "small")
    assert files.run(augment, stub, tmp_path / "summary.json").exit_code == 3
    s3.put("in/small.jsonl", b"\n".join(_SMALL))
    s3.faults = [Fault("DeleteObject", "stall", key="_rejects/small")]
    removed = s3.count_requests("DeleteObject", "_rejects/small")
    arguments = (
        f"s3://{s3.bucket}/in/",
        f"s3://{s3.bucket}/out/",
        "--target",
        stub.target,
        "--endpoint-url",
        s3.url,
        "--overwrite",
    )
    with augmenter_process(*arguments, env=dict(ENVIRONMENT)) as process:
        wait_for(
            lambda: s3.count_requests("DeleteObject", "_rejects/small") > removed,
            description="it removes the rejects",
        )
        process.kill()
    s3.faults.clear()
    for code, flags, rejects in ((0, (), 2), (0, ("--overwrite",), 0)):
        result = augment(*arguments[:-1], *flags)
        assert result.exit_code == code, result.stderr
        assert s3.objects["out/small.jsonl"].data == _augmented(_SMALL)
        assert len(s3.keys("out/_rejects/small")) == rejects
