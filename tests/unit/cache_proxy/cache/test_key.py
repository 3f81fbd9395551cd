# ruff: noqa: RUF001 - letters that look alike are the point
"""From a pair to its key: what is one pair, what is two, and that it stays so."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.cache_proxy.cache.key import NORMALIZERS, fold, make_batch_digester, make_digester
from services.cache_proxy.domain import DIGEST_BYTES

texts = st.text(max_size=12)
odd = st.text(alphabet="aAßẞſK Kﬁ\u0345\u0130ıǅµ·\u00a0\u3000\u00a8\u0301ａ１①Ω\t\u200b\u2028", max_size=8)
_SPACED = st.text(alphabet="aB \t\x1f\0", max_size=8)
_ANY_TEXT = st.one_of(
    _SPACED, _SPACED, st.text(alphabet=st.characters(codec="ascii"), max_size=20), texts, odd
)


@given(texts | odd)
def test_fold_is_idempotent(text: str) -> None:
    """A normal form is its own normal form."""
    assert fold(fold(text)) == fold(text)


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=20))
def test_folds_fast_path_is_the_slow_one(text: str) -> None:
    """What is folded without looking at Unicode comes out as if it had been."""
    assert fold(text) == " ".join(unicodedata.normalize("NFKC", text).casefold().split())


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=20) | texts | odd)
def test_what_is_hashed_under_fold_is_the_folded_text(text: str) -> None:
    """The bytes that go into the hash are those of `fold`, however they were made."""
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
def test_case_width_and_space_do_not_matter_under_fold(one: str, other: str) -> None:
    """Spellings of one name share a key, and under `exact` they do not."""
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
def test_many_are_hashed_as_each_alone(
    pairs: list[tuple[str, str]], normalize: str, secret: bytes | None
) -> None:
    """Whatever comes together, each pair's digest is `make_digester`'s: what is stored stays valid."""
    one = make_digester(normalize=normalize, secret=secret)
    many = make_batch_digester(normalize=normalize, secret=secret)
    texts = [text.encode() for pair in pairs for text in pair]
    assert many(texts) == [one(*pair) for pair in pairs]


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("é", "e"), ("a-b", "a b"), ("", "x"), ("ı", "i")])
def test_what_differs_in_more_than_spelling_stays_apart(one: str, other: str) -> None:
    """Fold takes away case, width and spaces' number, and nothing else."""
    assert fold(one) != fold(other)


@given(texts)
def test_exact_is_exact(text: str) -> None:
    """The text itself, whatever it is."""
    assert NORMALIZERS["exact"](text) == text.encode()


@given(texts, texts, texts, texts)
def test_two_pairs_share_a_key_only_with_equal_normal_forms(
    company: str, title: str, other_company: str, other_title: str
) -> None:
    """No way of cutting one text in two makes pairs meet."""
    for name, normal in NORMALIZERS.items():
        digest = make_digester(normalize=name, secret=None)
        same = (normal(company), normal(title)) == (normal(other_company), normal(other_title))
        assert (digest(company, title) == digest(other_company, other_title)) is same


@given(texts, st.integers(min_value=0, max_value=12))
def test_a_text_cut_at_two_places_makes_two_keys(text: str, place: int) -> None:
    """Company and title are not just joined."""
    digest = make_digester(normalize="exact", secret=None)
    cuts = {digest(text[:at], text[at:]) for at in {0, min(place, len(text)), len(text)}}
    assert len(cuts) == len({0, min(place, len(text)), len(text)})


def test_the_digest_of_a_known_pair_never_changes() -> None:
    """A refactoring that changed it would orphan every cache there is."""
    plain = make_digester(normalize="fold", secret=None)
    assert plain("Acme GmbH", "Senior Clerk").hex() == "36f2135d7769b5abb61ece3464432c6b"
    assert plain("株式会社", "ＣＥＯ").hex() == "075cae5222d314a6a6b09ae7d8db15ee"
    keyed = make_digester(normalize="exact", secret=b"s3cret")
    assert keyed("Acme GmbH", "Senior Clerk").hex() == "4ad60e295880fdf0fd2cb6e54ad4ec3c"


def test_a_secret_makes_keys_of_its_own_whatever_its_length() -> None:
    """No two secrets, short or longer than the hash takes, give the same keys."""
    secrets = [None, b"a", b"b", b"a" * 64, b"a" * 65, b"a" * 1000]
    digests = [make_digester(normalize="fold", secret=secret)("c", "t") for secret in secrets]
    assert len(set(digests)) == len(secrets)
    assert all(len(digest) == DIGEST_BYTES for digest in digests)
