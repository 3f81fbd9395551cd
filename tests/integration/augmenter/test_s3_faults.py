"""Each kind of call to S3 fails, before or after it has its effect: a file is whole, or failed and named."""

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.common import aws_client
from services.common.storage import s3_download, s3_upload
from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, RunResult
from tests.support.augmenter_process import augmenter_process
from tests.support.postings import make_posting
from tests.support.redis_server import wait_for
from tests.support.scripted_s3 import ALWAYS, ENVIRONMENT, OPERATIONS, Fault, ScriptedS3, scripted_s3

_BAD = b"not JSON"
_SMALL = [make_posting(id=i) for i in range(50)]
_LARGE = [make_posting(id=i, text="x" * 1_000) for i in range(11_000)]  # two parts and a rest
_INPUTS = {"small": _SMALL, "large": _LARGE}
_MULTIPART_OPERATIONS = {
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
}
# How a call fails: kind, whether it has its effect all the same, how often.
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
_QUICK = {
    ("PutObject", "403", False),
    ("UploadPart", "503", True),
    ("CompleteMultipartUpload", "reset", True),
}


def _cases() -> Iterator[object]:
    for operation, (kind, applied, times) in itertools.product(OPERATIONS, _FAULT_POINTS):
        marks = () if (operation, kind, applied) in _QUICK else pytest.mark.slow
        name = f"{operation}-{kind}-{'after' if applied else 'before'}-{'once' if times == 1 else 'always'}"
        yield pytest.param(operation, kind, applied, times, marks=marks, id=name)


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three attempts at everything, and next to no time between them."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("botocore.retryhandler.random", SimpleNamespace(random=lambda: 0.01))
    monkeypatch.setattr(aws_client, "_READ_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(s3_upload, "_CONFLICT_RETRY_SECONDS", (0.01,) * 3)
    monkeypatch.setattr(s3_download, "_FIRST_RETRY_SECONDS", 0.01)


@pytest.fixture
def s3() -> Iterator[ScriptedS3]:
    """A server with one bucket."""
    with scripted_s3() as server:
        yield server


def _augmented(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


class Files:
    """INPUT's files: each with a rejected line, but for one, so that there are rejects to be removed."""

    def __init__(self, s3: ScriptedS3, *names: str) -> None:
        self._s3 = s3
        self._names = names
        for name in names:
            s3.put(f"in/{name}.jsonl", b"\n".join([*_INPUTS[name], _BAD]))
        s3.put("in/clean.jsonl.gz", gzip.compress(b"\n".join(_SMALL)))

    def run(self, augment: RunAugmenter, stub: RunningStub, path: Path) -> RunResult:
        """Run over them."""
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
        """Every file is there with all of its lines; one of `but` may be missing, not damaged."""
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

    def check_outcome(self, ended: RunResult, path: Path) -> None:
        """Done files are whole, the others are named; the books hold."""
        if not path.exists():  # the run ended before its first file
            assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
            return
        told = json.loads(path.read_text())
        place = f"s3://{self._s3.bucket}/"
        failed = {failure["file"].removeprefix(place) for failure in told["failures"]}
        for name in failed:
            assert (
                sum(line.startswith(f"augmenter: {place}{name}: ") for line in ended.stderr.splitlines()) == 1
            )
        assert told["files"]["done"] + told["files"]["skipped"] == len(self._names) + 1 - len(failed)
        self.check_contents(but=failed)
        lines = told["lines"]
        assert lines["in"] == lines["augmented"] + lines["rejected"] + lines["blank"]
        done = [name for name in self._names if f"in/{name}.jsonl" not in failed]
        clean = 0 if "in/clean.jsonl.gz" in failed else len(_SMALL)
        assert lines["augmented"] == sum(len(_INPUTS[name]) for name in done) + clean
        assert ended.exit_code == (1 if failed else 3 if done else 0)


@pytest.mark.parametrize(("operation", "kind", "applied", "times"), list(_cases()))
def test_failed_call_costs_its_file_or_a_retry(
    augment: RunAugmenter,
    stub: RunningStub,
    s3: ScriptedS3,
    tmp_path: Path,
    operation: str,
    kind: str,
    applied: bool,
    times: int,
) -> None:
    """A file counts as done only if it is whole, with its rejects; else it is named, and done next time."""
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
    ended = files.run(augment, stub, tmp_path / "summary.json")
    assert s3.count_requests(operation) > 0
    files.check_outcome(ended, tmp_path / "summary.json")
    if times == 1 and operation != "AbortMultipartUpload":
        assert ended.exit_code == 3  # retried
    s3.faults.clear()
    again = files.run(augment, stub, tmp_path / "summary.json")
    assert again.exit_code in {0, 3}
    files.check_contents(but=set())


@pytest.mark.parametrize("key", ["out/_rejects/small.jsonl", ".reasons.jsonl", "out/small.jsonl"])
@pytest.mark.parametrize("kind", ["403", "503"])
def test_output_never_appears_before_its_rejects(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path, key: str, kind: str
) -> None:
    """Where the rejects or their reasons cannot be put, the output is not: it is the mark of a done file."""
    files = Files(s3, "small")
    s3.faults = [Fault("PutObject", kind, key=key)]
    ended = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(ended, tmp_path / "summary.json")
    assert "out/small.jsonl" not in s3.objects
    assert ended.stderr.startswith("augmenter: s3://b/in/small.jsonl: s3://b/out/")


def test_error_inside_an_answer_of_status_200_is_an_error(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path
) -> None:
    """CompleteMultipartUpload may fail behind its status line: the object is not there, the file failed."""
    files = Files(s3, "large")
    s3.faults = [Fault("CompleteMultipartUpload", "200")]
    ended = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(ended, tmp_path / "summary.json")
    assert ended.exit_code == 1
    assert "out/large.jsonl" not in s3.objects


@pytest.mark.parametrize("number", [0, 1, 2])
def test_part_that_fails_fails_its_file(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path, number: int
) -> None:
    """The first, a middle or the last part is refused: no object is made of the others."""
    files = Files(s3, "large")
    s3.faults = [Fault("UploadPart", "403", skip=number)]
    ended = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(ended, tmp_path / "summary.json")
    assert (ended.exit_code, s3.keys("out/large"), s3.uploads) == (1, [], {})


def test_conflict_with_a_write_under_way_is_waited_out(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path
) -> None:
    """409 says that a write of the key is under way, perhaps our own first try: it is tried again."""
    files = Files(s3, "small")
    s3.faults = [Fault("PutObject", "409", key="out/small", times=2)]
    ended = files.run(augment, stub, tmp_path / "summary.json")
    files.check_outcome(ended, tmp_path / "summary.json")
    assert ended.exit_code == 3


@pytest.mark.slow
def test_run_killed_before_it_removes_old_rejects_leaves_them_for_the_next_overwrite(
    augment: RunAugmenter, stub: RunningStub, s3: ScriptedS3, tmp_path: Path
) -> None:
    """The new output is whole and marked, so a plain run skips it; `--overwrite` removes the old rejects.

    docs/augmenter.md says so. To remove them before the output would lose them if the run ended there.
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
        ended = augment(*arguments[:-1], *flags)
        assert ended.exit_code == code, ended.stderr
        assert s3.objects["out/small.jsonl"].data == _augmented(_SMALL)
        assert len(s3.keys("out/_rejects/small")) == rejects
