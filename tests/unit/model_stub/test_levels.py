# ruff: noqa: RUF001 - letters that look alike are the point
"""The stub's levels: a pure function of the pair."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.levels import MAX_LEVEL, MIN_LEVEL
from services.model_stub.levels import fold, infer_level
from tests.support.processes import ROOT

texts = st.text(max_size=20)


@given(texts, texts)
def test_any_pair_has_level_in_range(company: str, title: str) -> None:
    """From entry to senior executive, whatever the text."""
    assert MIN_LEVEL <= infer_level(company, title) <= MAX_LEVEL


@given(texts, texts)
def test_case_and_white_space_do_not_change_level(company: str, title: str) -> None:
    """Neither case nor outer or repeated white space changes a level; folding is idempotent."""
    level = infer_level(company, title)
    assert infer_level(company.casefold(), title.casefold()) == level
    assert infer_level(f"\u3000{company} ", f" {title}\t") == level
    assert fold(fold(company)) == fold(company)


@pytest.mark.parametrize(
    "spelled", ["SENIOR clerk", "Ｓｅｎｉｏｒ　Clerk", " senior\tclerk ", "Senior-Clerk"]
)
def test_width_and_punctuation_do_not_change_level(spelled: str) -> None:
    """A title's words count, however they are written."""
    assert infer_level("Acme", spelled) == infer_level("Acme", "senior clerk")


def test_highest_ranking_word_and_company_determine_level() -> None:
    """The highest-ranking word decides, and companies differ by one either way."""
    companies = [f"Company {number}" for number in range(60)]
    levels = {
        word: {infer_level(company, word) for company in companies} for word in ("intern", "senior", "ceo")
    }
    assert levels == {"intern": {1, 2}, "senior": {3, 4, 5}, "ceo": {6, 7}}
    assert all(infer_level(one, "junior director") == infer_level(one, "director") for one in companies)


def test_levels_are_the_same_in_another_process() -> None:
    """No hash seed, no state: two stubs are one model."""
    code = (
        "from services.model_stub.levels import *; print([infer_level(f'c{n}', 'clerk') for n in range(50)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert runs == {f"{[infer_level(f'c{n}', 'clerk') for n in range(50)]}\n".encode()}
