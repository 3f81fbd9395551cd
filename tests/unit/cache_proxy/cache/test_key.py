# ruff: noqa: RUF001 - these tests are about letters that look alike
"""The key of a pair: which spellings share one, and that keys never change."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.cache_proxy.cache.key import NORMALIZERS, fold, make_batch_digester, make_digester
from services.cache_proxy.domain import DIGEST_BYTES

texts = st.text(max_size=12)
look_alikes = st.text(
    alphabet="aAßẞſK Kﬁ\u0345\u0130ıǅµ·\u00a0\u3000\u00a8\u0301ａ１①Ω\t\u200b\u2028", max_size=8
)
_SPACED = st.text(alphabet="aB \t\x1f\0", max_size=8)
_ANY_TEXT = st.one_of(
    _SPACED, _SPACED, st.text(alphabet=st.characters(codec="ascii"), max_size=20), texts, look_alikes
)


@given(texts | look_alikes)
def test_fold_is_idempotent(text: str) -> None:
    """Folding a normal form changes nothing."""
    assert fold(fold(text)) == fold(text)


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=20))
def test_fast_path_of_fold_equals_unicode_path(text: str) -> None:
    """ASCII is folded without Unicode tables, with the same result."""
    assert fold(text) == " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=20) | texts | look_alikes)
def test_normalizer_fold_returns_bytes_of_fold(text: str) -> None:
    """The bytes that are hashed are those of `fold`, by either path."""
    assert NORMALIZERS["fold"](text) == fold(text).encode()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Acme", "ACME"),
        ("Straße", "STRASSE"),
        ("Ａｃｍｅ　１", "acme 1"),
        ("ﬁnance", "FINANCE"),
        ("é", "e\u0301"),
        ("a  b", " a\u00a0b\t"),
        ("Σίσυφος", "ΣΊΣΥΦΟΣ"),
        ("\u212b", "å"),
        ("a\u2028b", "a b"),
    ],
)
def test_fold_ignores_case_width_and_spaces(one: str, other: str) -> None:
    """Spellings of one name share a key under `fold` and have different keys under `exact`."""
    digest = make_digester(normalize="fold", secret=None)
    assert digest(one, "t") == digest(other, "t")
    assert digest("c", one) == digest("c", other)
    strict = make_digester(normalize="exact", secret=None)
    assert strict(one, "t") != strict(other, "t")


@given(
    st.lists(st.tuples(_ANY_TEXT, _ANY_TEXT), max_size=6),
    st.sampled_from(list(NORMALIZERS)),
    st.sampled_from([None, b"s3cret"]),
)
@example([(" a\t\n b ", "\0"), ("c ", " d")], "fold", None)
@example([("a" + 9 * " " + "b", "c")], "fold", None)
@example([("  ", " "), ("", " \x1f\x85 ")], "fold", None)
def test_batch_digester_equals_single_digester(
    pairs: list[tuple[str, str]], normalize: str, secret: bytes | None
) -> None:
    """The digest of a pair does not depend on its batch, so stored entries stay valid."""
    one = make_digester(normalize=normalize, secret=secret)
    many = make_batch_digester(normalize=normalize, secret=secret)
    texts = [text.encode() for pair in pairs for text in pair]
    assert many(texts) == [one(*pair) for pair in pairs]


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("é", "e"), ("a-b", "a b"), ("", "x"), ("ı", "i")])
def test_fold_keeps_different_texts_apart(one: str, other: str) -> None:
    """Fold removes case, width and the number of spaces, and nothing else."""
    assert fold(one) != fold(other)


@given(texts)
def test_normalizer_exact_returns_the_text(text: str) -> None:
    """Any text is hashed unchanged."""
    assert NORMALIZERS["exact"](text) == text.encode()


@given(texts, texts, texts, texts)
def test_pairs_share_a_key_only_if_normal_forms_are_equal(
    company: str, title: str, other_company: str, other_title: str
) -> None:
    """Moving characters between company and title changes the key."""
    for name, normal in NORMALIZERS.items():
        digest = make_digester(normalize=name, secret=None)
        same = (normal(company), normal(title)) == (normal(other_company), normal(other_title))
        assert (digest(company, title) == digest(other_company, other_title)) is same


@given(texts, st.integers(min_value=0, max_value=12))
def test_text_split_at_two_positions_makes_two_keys(text: str, position: int) -> None:
    """Company and title are not just concatenated."""
    digest = make_digester(normalize="exact", secret=None)
    cuts = {digest(text[:at], text[at:]) for at in {0, min(position, len(text)), len(text)}}
    assert len(cuts) == len({0, min(position, len(text)), len(text)})


def test_digest_of_known_pair_never_changes() -> None:
    """A change would make every existing cache entry unreachable."""
    plain = make_digester(normalize="fold", secret=None)
    assert plain("Acme GmbH", "Senior Clerk").hex() == "36f2135d7769b5abb61ece3464432c6b"
    assert plain("株式会社", "ＣＥＯ").hex() == "075cae5222d314a6a6b09ae7d8db15ee"
    keyed = make_digester(normalize="exact", secret=b"s3cret")
    assert keyed("Acme GmbH", "Senior Clerk").hex() == "4ad60e295880fdf0fd2cb6e54ad4ec3c"


def test_each_secret_of_any_length_makes_different_keys() -> None:
    """No two secrets give the same keys, even if they are longer than a BLAKE2b key."""
    secrets = [None, b"a", b"b", b"a" * 64, b"a" * 65, b"a" * 1000]
    digests = [make_digester(normalize="fold", secret=secret)("c", "t") for secret in secrets]
    assert len(set(digests)) == len(secrets)
    assert all(len(digest) == DIGEST_BYTES for digest in digests)
