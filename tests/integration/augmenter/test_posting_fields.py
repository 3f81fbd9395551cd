"""Tests of postings whose members have other names, and of postings that have a level already."""

import json
from pathlib import Path

import pytest

from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, read_reasons
from tests.support.augmenter_process import read_summary
from tests.support.postings import make_posting

_LEVEL = infer_level("Acme", "Clerk")


def test_fields_may_have_other_names_and_be_nested(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """Company and title may be anywhere in the objects of a posting, and the level may have any name."""
    good = [
        b'{"id": 1, "content": {"company": "Acme", "role": "Clerk"}}',
        b'{"content":{"role":"Clerk","x":1,"company":"Acme"},"seniority":"own","title":7}',
        b'{"niveau":3,"content":{"company":"Acme","role":"Clerk","niveau":2}}',
        b'{"content":null,"content":{"company":"\\u0041cme","role":"x","role":"Clerk"}}',
    ]
    bad = [
        (b'{"content":{"company":"Acme"}}', "content.role is missing"),
        (b'{"company":"Acme","title":"Clerk"}', "content is missing"),
        (b'{"content":["Acme","Clerk"]}', "content is not an object"),
        (
            b'{"content":{"company":"Acme","role":"Clerk"},"content":{"role":"Clerk"}}',
            "content.company is missing",
        ),
        (b'{"content":{"company":"Acme","role":null}}', "content.role is not a string"),
    ]
    lines = [*good, *(line for line, _ in bad)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    result = augment(
        tmp_path / "a.jsonl",
        f"{tmp_path}/out/",
        "--target",
        stub.target,
        "--company-field",
        "content.company",
        "--title-field",
        "content.role",
        "--level-field",
        "niveau",
        "--summary-json",
        tmp_path / "s.json",
    )
    assert result.exit_code == 3
    good[2] = b'{"content":{"company":"Acme","role":"Clerk","niveau":2}}'
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == b"".join(
        line[:-1] + b', "niveau": %d}\n' % _LEVEL for line in good
    )
    assert [reason["reason"] for reason in read_reasons(tmp_path / "out" / "_rejects", "a.jsonl")] == [
        expected for _, expected in bad
    ]
    totals = read_summary(tmp_path / "s.json")
    assert (totals["lines"]["replaced"], totals["pairs"]["asked"]) == (1, 1)


def test_existing_levels_are_replaced_and_counted(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """An existing level is replaced by the model's, and the summary has the number of such lines."""
    lines = [make_posting(seniority="Lead/Director", id=i) for i in range(3)] + [
        make_posting(id=3),
        make_posting("POISON", seniority=1),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    result = augment(
        tmp_path / "a.jsonl",
        f"{tmp_path}/out/",
        "--target",
        stub.target,
        "--summary-json",
        tmp_path / "s.json",
    )
    assert result.exit_code == 3
    assert "3 levels replaced, 0 kept" in result.stdout
    assert read_summary(tmp_path / "s.json")["lines"] == {
        "in": 5,
        "augmented": 4,
        "rejected": 1,
        "blank": 0,
        "replaced": 3,
        "kept": 0,
    }
    postings = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_bytes().splitlines()]
    assert [(entry["id"], entry["seniority"]) for entry in postings] == [(i, _LEVEL) for i in range(4)]


def test_existing_levels_are_kept_if_requested(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """With --keep-existing, lines that have a level are written unchanged, and no pair is sent for them."""
    kept = [
        b' {"company": "Never asked", "title": "x", "seniority" : null }\t\r',
        b'{"\\u0073eniority":"Lead/Director"}',
        b'{"company":"Never asked","title":"x","seniority":1,"x":"\\ud800"}',
    ]
    plain = make_posting(x={"seniority": 1})
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([kept[0], plain, kept[1], b'["seniority"]', kept[2]]))
    (tmp_path / "b.jsonl").write_bytes(kept[1])
    result = augment(
        tmp_path,
        f"{tmp_path}-out/",
        "--target",
        stub.target,
        "--keep-existing",
        "--summary-json",
        f"{tmp_path}-s.json",
    )
    assert result.exit_code == 3
    assert Path(f"{tmp_path}-out/a.jsonl").read_bytes() == (
        kept[0].strip()
        + b"\n"
        + plain[:-1]
        + b', "seniority": %d}\n' % _LEVEL
        + kept[1]
        + b"\n"
        + kept[2]
        + b"\n"
    )
    assert Path(f"{tmp_path}-out/b.jsonl").read_bytes() == kept[1] + b"\n"
    totals = read_summary(Path(f"{tmp_path}-s.json"))
    assert totals["lines"] == {
        "in": 6,
        "augmented": 5,
        "rejected": 1,
        "blank": 0,
        "replaced": 0,
        "kept": 4,
    }
    assert totals["pairs"]["asked"] == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--company-field", ""),
        ("--title-field", "a..b"),
        ("--level-field", "a.b"),
        ("--level-field", "company"),
        ("--max-line-bytes", "1"),
        ("--max-line-bytes", "2GiB"),
        ("--max-zstd-window", "100"),
        ("--max-zstd-window", "x"),
    ],
)
def test_invalid_setting_is_a_usage_error(
    augment: RunAugmenter, tmp_path: Path, flag: str, value: str
) -> None:
    """An invalid field name or limit is a usage error that names the flag."""
    result = augment(tmp_path, f"{tmp_path}-out/", "--target", "127.0.0.1:1", flag, value)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert flag in result.stderr
