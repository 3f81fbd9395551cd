"""`augmenter run` on a real S3 server: streamed both ways, whole or not at all, marked with its input."""

import asyncio
import gzip
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.common.storage.errors import (
    AlreadyDoneError,
    InputChangedError,
    OutputConflictError,
    StorageError,
)
from services.common.storage.protocol import ABSENT, FileInfo
from services.common.storage.s3 import S3Store
from services.common.storage.s3_client import aws_client
from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.postings import make_posting
from tests.support.s3_bucket import Bucket
from tests.support.tcp_relay import SLOW_DOWN_RESPONSE, reject_conditional_writes, tcp_relay

_SOURCE = FileInfo("a.jsonl", 1, '"its-etag"', 0)


def _expected(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


def test_bucket_to_bucket(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """Prefix to prefix: names kept, rejects beside, outputs marked with their input's ETag, then skipped."""
    lines = [make_posting(id=i) for i in range(100)]
    plain = bucket.put("raw/1.jsonl", b"\n".join(lines))
    packed = bucket.put("raw/deep/2.jsonl.gz", gzip.compress(b"bad\n" + b"\n".join(lines)))
    bucket.put("raw/readme.txt", b"not ours")
    bucket.put("raw-not/3.jsonl", b"not ours")
    place = f"s3://{bucket.name}"
    args = (f"{place}/raw/", f"{place}/mod", "--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    ended = augment(*args)
    assert (ended.exit_code, ended.stderr) == (3, "")
    assert "200 augmented + 1 rejected" in ended.stdout
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == [
        "mod/1.jsonl",
        "mod/_rejects/deep/2.jsonl.gz",
        "mod/_rejects/deep/2.jsonl.gz.reasons.jsonl",
        "mod/deep/2.jsonl.gz",
    ]
    assert bucket.get("mod/1.jsonl") == _expected(lines)
    assert gzip.decompress(bucket.get("mod/deep/2.jsonl.gz")) == _expected(lines)
    assert gzip.decompress(bucket.get("mod/_rejects/deep/2.jsonl.gz")) == b"bad\n"
    assert (bucket.input_etag("mod/1.jsonl"), bucket.input_etag("mod/deep/2.jsonl.gz")) == (plain, packed)
    assert "0 done, 2 skipped" in augment(*args).stdout
    bucket.put("raw/deep/2.jsonl.gz", gzip.compress(lines[0]))
    ended = augment(*args)
    assert (ended.exit_code, "1 done, 1 skipped" in ended.stdout) == (0, True)
    assert not [key for key in bucket.list_keys() if "_rejects" in key]


def test_between_bucket_and_folder(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """Any mix of places works, also of single files, and what is done is known in both directions."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    up = (tmp_path / "a.jsonl", f"s3://{bucket.name}/up/b.jsonl", *common)
    assert augment(*up).exit_code == 0
    assert bucket.get("up/b.jsonl") == _expected([make_posting()])
    assert "1 skipped" in augment(*up).stdout
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert "1 done" in augment(*up).stdout
    down = (f"s3://{bucket.name}/up/", tmp_path / "down", *common)
    assert augment(*down).exit_code == 0
    assert (tmp_path / "down" / "b.jsonl").read_bytes() == _expected([make_posting()])
    assert "1 skipped" in augment(*down).stdout


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
def test_names_are_kept_whatever_they_hold(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """Signs that URLs, XML and shells take for their own reach the output's name as they were, and back."""
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
def test_large_object_goes_in_parts(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """An output over the size of a part arrives whole, its parts in order, and marked."""
    lines = [make_posting(id=i, text="x" * 1_000) for i in range(20_000)]
    etag = bucket.put("raw/big.jsonl", b"\n".join(lines))
    ended = augment(
        f"s3://{bucket.name}/raw/big.jsonl",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert ended.exit_code == 0
    assert bucket.get("mod/big.jsonl") == _expected(lines)
    assert bucket.input_etag("mod/big.jsonl") == etag


@pytest.mark.slow
def test_failed_file_leaves_no_object(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """A file that fails behind its first parts leaves neither an object nor parts of one."""
    lines = b"\n".join(make_posting(id=i, text="x" * 1_000) for i in range(20_000))
    bucket.put("raw/cut.jsonl.gz", gzip.compress(lines, 1)[:-9])
    noise = b"\n".join(make_posting(id=i, text=random.Random(i).randbytes(600).hex()) for i in range(20_000))
    bucket.put("raw/noise.jsonl.gz", gzip.compress(noise, 1)[:-9])
    ended = augment(
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert ended.exit_code == 1
    assert sorted(ended.stderr.splitlines()) == [
        f"augmenter: s3://{bucket.name}/raw/{name}.jsonl.gz: the compressed input is cut short"
        for name in ("cut", "noise")
    ]
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == []
    assert bucket.count_unfinished_uploads() == 0


def test_missing_places_are_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """A missing bucket, on either side, and a missing key end with exit 1 and one line naming them."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    for source, sink, named in (
        ("s3://no-such-bucket/raw/", tmp_path / "out", "s3://no-such-bucket/raw/: the bucket does not exist"),
        (tmp_path / "a.jsonl", "s3://no-such-bucket/", "s3://no-such-bucket/: the bucket does not exist"),
        (f"s3://{bucket.name}/no.jsonl", f"{tmp_path}/x/", f"s3://{bucket.name}/no.jsonl: does not exist"),
    ):
        ended = augment(source, sink, *common)
        assert (ended.exit_code, ended.stderr) == (1, f"augmenter: {named}\n")


def test_wrong_or_no_credentials_are_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that are wrong or not there end with exit 1 and one line that names the bucket."""
    args = (f"s3://{bucket.name}/raw/", tmp_path / "out", "--target", stub.target)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    ended = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith(f"augmenter: s3://{bucket.name}/raw/: ")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    ended = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert ended.exit_code == 1
    assert ended.stderr == f"augmenter: s3://{bucket.name}/raw/: Unable to locate credentials\n"


@pytest.fixture
async def store(bucket: Bucket) -> AsyncIterator[S3Store]:
    """The bucket as the augmenter sees it."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, max_connections=4) as client:
        yield S3Store(client, bucket=bucket.name, prefix="p/")


@pytest.mark.slow
async def test_abandoned_upload_leaves_nothing(store: S3Store) -> None:
    """An upload that is left before it is completed, its parts on their way, stores nothing."""

    async def abandon() -> None:
        async with store.create("big.jsonl", _SOURCE) as upload:
            await upload.write(bytes(20 * 2**20))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await abandon()
    with pytest.raises(StorageError, match="does not exist"):
        await store.get_info("big.jsonl")


async def test_object_that_changed_since_the_listing_is_refused(store: S3Store) -> None:
    """Reading asks for the very version that was listed, so an output is never of a mix."""

    async def write(text: bytes) -> None:
        async with store.create("a.jsonl", _SOURCE) as upload:
            await upload.write(text)
            await upload.complete()

    await write(b"first")
    listed = await store.get_info("a.jsonl")
    assert [data async for data in store.read(listed)] == [b"first"]
    await write(b"second")
    with pytest.raises(InputChangedError):
        [data async for data in store.read(listed)]


async def test_server_that_ignores_conditions_on_reading_is_seen_through(bucket: Bucket) -> None:
    """Where a read is not refused, the ETag of its answer tells that the object is another."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, max_connections=2) as client:
        store = S3Store(client, bucket=bucket.name, prefix="p/")
        await _write(store, b"first")
        listed = await store.get_info("a.jsonl")
        await _write(store, b"other")
        client.meta.events.register("before-call.s3.GetObject", _without_condition)
        with pytest.raises(InputChangedError):
            [data async for data in store.read(listed)]


def _without_condition(params: dict[str, Any], **_: object) -> None:
    del params["headers"]["If-Match"]


@pytest.mark.slow
async def test_stream_that_breaks_goes_on_where_it_broke(store: S3Store, bucket: Bucket) -> None:
    """A download that is cut off again and again is taken up at its byte: every byte arrives, once."""
    data = random.Random(1).randbytes(5 * 2**20)
    await _write(store, data)

    def plan(number: int) -> int | None:
        return 2**20 + 300_000 if number < 3 else None

    with tcp_relay(bucket.endpoint_url, plan) as way:
        async with aws_client("s3", endpoint_url=way.url, max_connections=4) as client:
            broken = S3Store(client, bucket=bucket.name, prefix="p/")
            item = await store.get_info("a.jsonl")
            assert b"".join([piece async for piece in broken.read(item)]) == data
    assert way.connection_count >= 4


@pytest.mark.slow
async def test_throttling_is_waited_out(store: S3Store, bucket: Bucket) -> None:
    """503 Slow Down costs a retry, not a file."""
    await _write(store, b"text")
    with tcp_relay(bucket.endpoint_url, lambda number: SLOW_DOWN_RESPONSE if number < 2 else None) as way:
        async with aws_client("s3", endpoint_url=way.url, max_connections=1) as client:
            throttled = S3Store(client, bucket=bucket.name, prefix="p/")
            assert (await throttled.get_info("a.jsonl")).size_bytes == 4
    assert way.connection_count >= 3


@pytest.mark.slow
async def test_a_burst_of_throttling_costs_time_only(store: S3Store, bucket: Bucket) -> None:
    """Many requests at once, all told to slow down for some seconds: each is answered in the end."""
    await _write(store, b"text")
    until = time.monotonic() + 3
    with tcp_relay(
        bucket.endpoint_url, lambda _: SLOW_DOWN_RESPONSE if time.monotonic() < until else None
    ) as way:
        async with aws_client("s3", endpoint_url=way.url, max_connections=32) as client:
            throttled = S3Store(client, bucket=bucket.name, prefix="p/")
            found = await asyncio.gather(*(throttled.get_info("a.jsonl") for _ in range(64)))
    assert [item.size_bytes for item in found] == [4] * 64
    assert way.connection_count > 64 + 500 // 5  # more tries than a shared allowance would have let pass


async def _write(store: S3Store, text: bytes, onto: str | None = None, source: FileInfo = _SOURCE) -> str:
    async with store.create(source.name, source, expected_version=onto) as upload:
        await upload.write(text)
        await upload.complete()
    return (await store.get_info(source.name)).version


@pytest.mark.parametrize("size", [10, pytest.param(20 * 2**20, marks=pytest.mark.slow)])
async def test_an_output_is_put_only_onto_what_was_there(store: S3Store, size: int) -> None:
    """Of two writers of one file the second finds it done; one with another input is refused."""
    first = await _write(store, b"1" * size, onto=ABSENT)
    with pytest.raises(AlreadyDoneError):
        await _write(store, b"2" * size, onto=ABSENT)
    other = FileInfo("source.jsonl", 1, '"another-etag"', 0)
    async with store.create("a.jsonl", other, expected_version='"not-it"') as upload:
        await upload.write(b"3" * size)
        with pytest.raises(OutputConflictError):
            await upload.complete()
    assert (await store.get_info("a.jsonl")).version == first
    assert await _write(store, b"4" * size, onto=first) != first


@pytest.mark.slow
async def test_a_server_without_conditional_writes_is_looked_at_first(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """Where conditions are refused, outputs are made all the same: one warning, and never onto another's."""
    with tcp_relay(bucket.endpoint_url, reject=reject_conditional_writes) as way:
        async with aws_client("s3", endpoint_url=way.url, max_connections=4) as client:
            plain, first = S3Store(client, bucket=bucket.name, prefix="p/"), ABSENT
            some = (FileInfo(f"{i}.jsonl", 1, "v", 0) for i in range(4))
            await asyncio.gather(*(_write(plain, b"0", onto=ABSENT, source=one) for one in some))
            for size in (10, 20 * 2**20):
                first = await _write(plain, b"1" * size, onto=first)
                with pytest.raises(AlreadyDoneError):
                    await _write(plain, b"2" * size, onto=ABSENT)
                with pytest.raises(OutputConflictError):
                    await _write(plain, b"3" * size, onto="no", source=FileInfo("a.jsonl", 1, "other", 0))
                assert (await plain.get_info("a.jsonl")).version == first
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "no conditional writes" in said[0]


@pytest.mark.slow
async def test_two_writers_of_one_large_file_do_not_end_each_other(store: S3Store, bucket: Bucket) -> None:
    """Both write all of it at the same time: the first to complete has it, the other finds it done."""
    async with store.create("a.jsonl", _SOURCE, expected_version=ABSENT) as first:
        await first.write(bytes(20 * 2**20))
        made = await _write(store, b"2" * (20 * 2**20), onto=ABSENT)
        await first.write(bytes(20 * 2**20))
        with pytest.raises(AlreadyDoneError):
            await first.complete()
    assert (await store.get_info("a.jsonl")).version == made


@pytest.mark.slow
async def test_writer_whose_upload_was_ended_is_told(store: S3Store, bucket: Bucket) -> None:
    """An upload that somebody ends fails its file, which is done anew; nothing of it is left."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, max_connections=1) as client:
        async with store.create("a.jsonl", _SOURCE, expected_version=ABSENT) as upload:
            await upload.write(bytes(20 * 2**20))
            page = await client.list_multipart_uploads(Bucket=bucket.name)
            [begun] = page["Uploads"]
            await client.abort_multipart_upload(
                Bucket=bucket.name, Key=begun["Key"], UploadId=begun["UploadId"]
            )
            with pytest.raises(OutputConflictError):
                await upload.complete()
        page = await client.list_multipart_uploads(Bucket=bucket.name)
    assert not page.get("Uploads")


async def test_listing_begins_behind_a_name(store: S3Store) -> None:
    """What --lookback has passed is not listed at all."""
    for name in ("1.jsonl", "2.jsonl", "30.jsonl"):
        async with store.create(name, _SOURCE) as upload:
            await upload.write(b"{}")
            await upload.complete()
    assert [item.name async for item in store.list(after="2")] == ["2.jsonl", "30.jsonl"]
    assert [item.name async for item in store.list(after="2.jsonl")] == ["30.jsonl"]
