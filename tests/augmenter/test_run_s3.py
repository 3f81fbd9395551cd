"""`augmenter run` on a real S3 server: streamed both ways, whole or not at all, marked with its input."""

import asyncio
import gzip
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from services.augmenter.errors import InputChangedError, StoreError
from services.augmenter.object_store.protocol import Item
from services.augmenter.object_store.s3 import S3Store
from services.augmenter.object_store.s3_client import aws_client
from services.model_stub.levels import infer_level
from tests.augmenter.conftest import Augment, Stub, posting
from tests.support.s3 import S3Server

_T = TypeVar("_T")
_SOURCE = Item("source.jsonl", 1, '"its-etag"', 0)


class Bucket:
    """A bucket as the test sees it, with a client of its own."""

    def __init__(self, server: S3Server, name: str) -> None:
        self.endpoint_url = server.endpoint_url
        self.name = name
        self._do(lambda client: client.create_bucket(Bucket=name))

    def _do(self, use: Callable[[Any], Coroutine[Any, Any, _T]]) -> _T:
        async def run() -> _T:
            async with aws_client("s3", endpoint_url=self.endpoint_url, connections=2) as client:
                return await use(client)

        return asyncio.run(run())

    def put(self, key: str, data: bytes) -> str:
        """Store an object; its ETag."""
        etag: str = self._do(lambda client: client.put_object(Bucket=self.name, Key=key, Body=data))["ETag"]
        return etag

    def get(self, key: str) -> bytes:
        """An object's bytes."""

        async def read(client: Any) -> bytes:
            answer = await client.get_object(Bucket=self.name, Key=key)
            async with answer["Body"] as body:
                data: bytes = await body.read()
                return data

        return self._do(read)

    def mark(self, key: str) -> str:
        """What the object says it was made of."""
        head = self._do(lambda client: client.head_object(Bucket=self.name, Key=key))
        return str(head["Metadata"]["input-etag"])

    def listed(self) -> list[str]:
        """All keys."""
        page = self._do(lambda client: client.list_objects_v2(Bucket=self.name))
        return [entry["Key"] for entry in page.get("Contents", ())]

    def unfinished(self) -> int:
        """Multipart uploads neither completed nor aborted."""
        page = self._do(lambda client: client.list_multipart_uploads(Bucket=self.name))
        return len(page.get("Uploads", ()))


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of the test's own, with the credentials for it in the environment."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Bucket(s3, f"test-{random.SystemRandom().randrange(2**40):x}")


def _expected(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


def test_bucket_to_bucket(augment: Augment, stub: Stub, bucket: Bucket) -> None:
    """Prefix to prefix: names kept, rejects beside, outputs marked with their input's ETag, then skipped."""
    lines = [posting(id=i) for i in range(100)]
    plain = bucket.put("raw/1.jsonl", b"\n".join(lines))
    packed = bucket.put("raw/deep/2.jsonl.gz", gzip.compress(b"bad\n" + b"\n".join(lines)))
    bucket.put("raw/readme.txt", b"not ours")
    bucket.put("raw-not/3.jsonl", b"not ours")
    place = f"s3://{bucket.name}"
    args = (f"{place}/raw/", f"{place}/mod", "--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    ended = augment(*args)
    assert (ended.code, ended.err) == (3, "")
    assert "200 augmented + 1 rejected" in ended.out
    assert [key for key in bucket.listed() if key.startswith("mod")] == [
        "mod/1.jsonl",
        "mod/_rejects/deep/2.jsonl.gz",
        "mod/_rejects/deep/2.jsonl.gz.reasons.jsonl",
        "mod/deep/2.jsonl.gz",
    ]
    assert bucket.get("mod/1.jsonl") == _expected(lines)
    assert gzip.decompress(bucket.get("mod/deep/2.jsonl.gz")) == _expected(lines)
    assert gzip.decompress(bucket.get("mod/_rejects/deep/2.jsonl.gz")) == b"bad\n"
    assert (bucket.mark("mod/1.jsonl"), bucket.mark("mod/deep/2.jsonl.gz")) == (plain, packed)
    assert "0 done, 2 skipped" in augment(*args).out
    bucket.put("raw/deep/2.jsonl.gz", gzip.compress(lines[0]))
    ended = augment(*args)
    assert (ended.code, "1 done, 1 skipped" in ended.out) == (0, True)
    assert not [key for key in bucket.listed() if "_rejects" in key]


def test_between_bucket_and_folder(augment: Augment, stub: Stub, bucket: Bucket, tmp_path: Path) -> None:
    """Any mix of places works, also of single files, and what is done is known in both directions."""
    (tmp_path / "a.jsonl").write_bytes(posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    up = (tmp_path / "a.jsonl", f"s3://{bucket.name}/up/b.jsonl", *common)
    assert augment(*up).code == 0
    assert bucket.get("up/b.jsonl") == _expected([posting()])
    assert "1 skipped" in augment(*up).out
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert "1 done" in augment(*up).out
    down = (f"s3://{bucket.name}/up/", tmp_path / "down", *common)
    assert augment(*down).code == 0
    assert (tmp_path / "down" / "b.jsonl").read_bytes() == _expected([posting()])
    assert "1 skipped" in augment(*down).out


def test_large_object_goes_in_parts(augment: Augment, stub: Stub, bucket: Bucket) -> None:
    """An output over the size of a part arrives whole, its parts in order, and marked."""
    lines = [posting(id=i, text="x" * 1_000) for i in range(20_000)]
    etag = bucket.put("raw/big.jsonl", b"\n".join(lines))
    ended = augment(
        f"s3://{bucket.name}/raw/big.jsonl", f"s3://{bucket.name}/mod/",
        "--target", stub.target, "--endpoint-url", bucket.endpoint_url,
    )  # fmt: skip
    assert ended.code == 0
    assert bucket.get("mod/big.jsonl") == _expected(lines)
    assert bucket.mark("mod/big.jsonl") == etag


def test_failed_file_leaves_no_object(augment: Augment, stub: Stub, bucket: Bucket) -> None:
    """A file that fails behind its first parts leaves neither an object nor parts of one."""
    lines = b"\n".join(posting(id=i, text="x" * 1_000) for i in range(20_000))
    bucket.put("raw/cut.jsonl.gz", gzip.compress(lines, 1)[:-9])
    noise = b"\n".join(posting(id=i, text=random.Random(i).randbytes(600).hex()) for i in range(20_000))
    bucket.put("raw/noise.jsonl.gz", gzip.compress(noise, 1)[:-9])
    ended = augment(
        f"s3://{bucket.name}/raw/", f"s3://{bucket.name}/mod/",
        "--target", stub.target, "--endpoint-url", bucket.endpoint_url,
    )  # fmt: skip
    assert ended.code == 1
    assert sorted(ended.err.splitlines()) == [
        f"augmenter: s3://{bucket.name}/raw/{name}.jsonl.gz: the compressed input is cut short"
        for name in ("cut", "noise")
    ]
    assert [key for key in bucket.listed() if key.startswith("mod")] == []
    assert bucket.unfinished() == 0


def test_missing_places_are_one_line(augment: Augment, stub: Stub, bucket: Bucket, tmp_path: Path) -> None:
    """A missing bucket, on either side, and a missing key end with exit 1 and one line naming them."""
    (tmp_path / "a.jsonl").write_bytes(posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    for source, sink, named in (
        ("s3://no-such-bucket/raw/", tmp_path / "out", "s3://no-such-bucket/raw/: the bucket does not exist"),
        (tmp_path / "a.jsonl", "s3://no-such-bucket/", "s3://no-such-bucket/: the bucket does not exist"),
        (f"s3://{bucket.name}/no.jsonl", f"{tmp_path}/x/", f"s3://{bucket.name}/no.jsonl: does not exist"),
    ):
        ended = augment(source, sink, *common)
        assert (ended.code, ended.err) == (1, f"augmenter: {named}\n")


def test_wrong_or_no_credentials_are_one_line(
    augment: Augment, stub: Stub, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that are wrong or not there end with exit 1 and one line that names the bucket."""
    args = (f"s3://{bucket.name}/raw/", tmp_path / "out", "--target", stub.target)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    ended = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith(f"augmenter: s3://{bucket.name}/raw/: ")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    ended = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert ended.code == 1
    assert ended.err == f"augmenter: s3://{bucket.name}/raw/: Unable to locate credentials\n"


@pytest.fixture
async def store(bucket: Bucket) -> AsyncIterator[S3Store]:
    """The bucket as the augmenter sees it."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, connections=4) as client:
        yield S3Store(client, bucket=bucket.name, prefix="p/")


async def test_abandoned_upload_leaves_nothing(store: S3Store) -> None:
    """An upload that is left before it is completed, its parts on their way, stores nothing."""

    async def abandon() -> None:
        async with store.create("big.jsonl", _SOURCE) as upload:
            await upload.write(bytes(20 * 2**20))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await abandon()
    with pytest.raises(StoreError, match="does not exist"):
        await store.find("big.jsonl")


async def test_object_that_changed_since_the_listing_is_refused(store: S3Store) -> None:
    """Reading asks for the very version that was listed, so an output is never of a mix."""

    async def write(text: bytes) -> None:
        async with store.create("a.jsonl", _SOURCE) as upload:
            await upload.write(text)
            await upload.complete()

    await write(b"first")
    listed = await store.find("a.jsonl")
    assert [data async for data in store.read(listed)] == [b"first"]
    await write(b"second")
    with pytest.raises(InputChangedError):
        [data async for data in store.read(listed)]
