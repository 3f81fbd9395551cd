"""Tests of merging the listings of INPUT and OUTPUT."""

import os
from pathlib import Path

from services.augmenter.sources.listing import FileLister, Shard
from services.common.storage.local import LocalStore
from tests.support.postings import make_posting


async def test_listings_are_merged(tmp_path: Path) -> None:
    """Merging the listings of INPUT and OUTPUT finds which files have an output, whatever else is there."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    for folder, names in ((source, "abcdeé"), (sink, "0bdxé")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jsonl").write_bytes(make_posting())
    for name in "bé":
        status = (source / f"{name}.jsonl").stat()
        os.utime(sink / f"{name}.jsonl", ns=(status.st_mtime_ns, status.st_mtime_ns))
    os.utime(sink / "d.jsonl", ns=(1, 1))
    lister = FileLister(LocalStore(source), LocalStore(sink), shard=Shard(), overwrite=False)
    states = [
        (task.file.name[0], task.is_done, bool(task.expected_version)) async for task in lister.list_tasks()
    ]
    assert states == [
        ("a", False, False),
        ("b", True, True),
        ("c", False, False),
        ("d", False, True),
        ("e", False, False),
        ("é", True, True),
    ]
    assert [task.file.name async for task in lister.list_tasks(after="d")] == [
        "d.jsonl",
        "e.jsonl",
        "é.jsonl",
    ]
