"""Tests of storage in local folders."""

import asyncio
from pathlib import Path

import pytest

from services.common.errors import FileError
from services.common.storage.errors import (
    AlreadyDoneError,
    InputChangedError,
    OutputConflictError,
    StorageError,
)
from services.common.storage.local import LocalStore
from services.common.storage.protocol import ABSENT, FileInfo
from tests.support.postings import make_posting


@pytest.mark.parametrize(("modified_ns", "error"), [(1, AlreadyDoneError), (2, OutputConflictError)])
async def test_two_writers_of_one_file_do_not_interfere(
    tmp_path: Path, modified_ns: int, error: type[FileError]
) -> None:
    """Neither removes the other's file. The slower one fails, and abandoned files are removed."""
    abandoned = tmp_path / ".a.jsonl.00000000.augmenter-tmp"
    abandoned.touch()
    store = LocalStore(tmp_path)
    slower = store.create("a.jsonl", FileInfo("a.jsonl", 1, "v", modified_ns), expected_version=ABSENT)
    with pytest.raises(error):  # noqa: PT012 - one writer inside the other
        async with slower:
            await slower.write(b"slower")
            async with store.create(
                "a.jsonl", FileInfo("a.jsonl", 1, "v", 1), expected_version=ABSENT
            ) as faster:
                await faster.write(b"faster")
                await faster.complete()
            await slower.complete()
    remaining = await asyncio.to_thread(lambda: [path.name for path in tmp_path.iterdir()])
    assert remaining == ["a.jsonl"]
    assert (tmp_path / "a.jsonl").read_bytes() == b"faster"


async def test_input_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """An input that grows while it is read is an error, not a shorter output."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    store = LocalStore(tmp_path)
    item = await store.get_info("a.jsonl")
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputChangedError):
        [data async for data in store.read(item)]


@pytest.mark.parametrize(
    "name", ["../x.jsonl", "a/../../x.jsonl", "/etc/x.jsonl", "a//x.jsonl", "./x.jsonl", "a\0b"]
)
async def test_names_never_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """No name of an object, however odd, can create a file outside the output folder."""
    store = LocalStore(tmp_path / "out")
    await store.check_writable()
    with pytest.raises(StorageError):
        await store.create(name, FileInfo(name, 1, "v", 0)).__aenter__()
    files = await asyncio.to_thread(lambda: [path for path in tmp_path.rglob("*") if path.is_file()])
    assert files == []


async def test_folder_at_the_path_of_an_output_is_reported(tmp_path: Path) -> None:
    """One key may be a prefix of another. The folder that this creates is not another process's output."""
    item = FileInfo("a.jsonl", 1, "1", 1)
    async with LocalStore(tmp_path).create("a.jsonl", item, expected_version=ABSENT) as upload:
        (tmp_path / "a.jsonl").mkdir()
        with pytest.raises(StorageError, match="a folder stands there"):
            await upload.complete()
