"""Tests of lines and pairs that are rejected, and of the files that hold them."""

import json
from pathlib import Path

from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, read_reasons
from tests.support.postings import make_posting


def _level(company: str = "Acme", title: str = "Clerk") -> bytes:
    return b', "seniority": %d}\n' % infer_level(company, title)


def test_bad_lines_are_rejected_and_the_others_augmented(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """Bad lines are written to the rejects byte for byte, with number and reason, others augmented."""
    good = make_posting()
    big = make_posting(text="x" * 2**20)
    data = b"\n".join(
        [
            b"\xef\xbb\xbf  " + good + b" \t\r",
            b"not JSON\r",
            b"",
            b" \t\r",
            b'{"company":"Acme","title":null} ',
            b'{"company":"\xff","title":"Clerk"}',
            b'{"seniority":"old",' + good[1:] + b"\r",
            big,
            b'{"nested":{"company":"X","seniority":1},' + good[1:],
            good,
        ]
    )
    source = tmp_path / "a.jsonl"
    source.write_bytes(data)
    sink = tmp_path / "out.jsonl"
    result = augment(source, sink, "--target", stub.target, "--summary-json", tmp_path / "s.json")
    assert result.exit_code == 3
    assert sink.read_bytes() == b"".join(
        line[:-1] + _level()
        for line in (good, good, big, b'{"nested":{"company":"X","seniority":1},' + good[1:], good)
    )
    rejects = tmp_path / "_rejects"
    assert (rejects / "a.jsonl").read_bytes() == (
        b'not JSON\r\n{"company":"Acme","title":null} \n{"company":"\xff","title":"Clerk"}\n'
    )
    assert read_reasons(rejects, "a.jsonl") == [
        {"line": 2, "reason": "not JSON: Expecting value (character 1)"},
        {"line": 5, "reason": "title is not a string"},
        {"line": 6, "reason": "not valid UTF-8 (byte 13)"},
    ]
    assert json.loads((tmp_path / "s.json").read_text())["lines"] == {
        "in": 10,
        "augmented": 5,
        "rejected": 3,
        "blank": 2,
        "replaced": 1,
        "kept": 0,
    }


def test_rejected_first_line_keeps_its_byte_order_mark(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """A rejected line is kept byte for byte, including the mark before the file's first line."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf[]\n" + make_posting())
    assert augment(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--target", stub.target).exit_code == 3
    assert (tmp_path / "_rejects" / "a.jsonl").read_bytes() == b"\xef\xbb\xbf[]\n"
    assert (tmp_path / "b.jsonl").read_bytes() == make_posting()[:-1] + _level()


def test_poison_pairs_become_rejected_lines(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """Pairs that the model rejects, named or not, become rejected lines. The others are augmented."""
    companies = [f"C{i}" for i in range(40)] + ["POISON", "NAMED one", "NAMED two"]
    lines = [make_posting(company) for company in companies]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    result = augment(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--target", stub.target)
    assert result.exit_code == 3
    assert len((tmp_path / "b.jsonl").read_bytes().splitlines()) == 40
    assert (tmp_path / "_rejects" / "a.jsonl").read_bytes() == b"".join(line + b"\n" for line in lines[40:])
    written_reasons = read_reasons(tmp_path / "_rejects", "a.jsonl")
    assert [reason["line"] for reason in written_reasons] == [41, 42, 43]
    assert all("cannot judge" in reason["reason"] for reason in written_reasons)


def test_rejects_are_never_input(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """An output folder used as input gives its postings, without its rejects."""
    first = tmp_path / "first"
    second = tmp_path / "second"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"bad\n" + make_posting())
    assert augment(tmp_path / "in", first, "--target", stub.target).exit_code == 3
    assert augment(first, second, "--target", stub.target).exit_code == 0
    assert [path.name for path in second.rglob("*")] == ["a.jsonl"]
    (first / "_rejects" / "a.jsonl").write_bytes(make_posting())
    assert augment(first / "_rejects", tmp_path / "third", "--target", stub.target).exit_code == 0
    assert not (tmp_path / "third" / "a.jsonl.reasons.jsonl").exists()
