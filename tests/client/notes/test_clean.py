"""Accepted text is normal, printable and within length; hostile text costs linear time."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from client.notes.clean import MAX_ID, clean_id, clean_text
from client.notes.note import BadRecord, Reason

ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates included
REFUSALS = {Reason.EMPTY, Reason.TOO_SHORT, Reason.TOO_LONG, Reason.ENCODING}
T = TypeVar("T")


def _attempt(function: Callable[..., T], *values: object) -> T | BadRecord:
    try:
        return function(*values)
    except BadRecord as bad:
        return bad


@hypothesis_settings(deadline=None)
@given(ANY_TEXT)
def test_accepted_text_keeps_every_promise(text: str) -> None:
    cleaned = _attempt(clean_text, text, 3, 40)
    if isinstance(cleaned, BadRecord):
        assert cleaned.reason in REFUSALS
        return
    assert 3 <= len(cleaned) <= 40
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not [c for c in cleaned if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert clean_text(cleaned, 3, 40) == cleaned
    cleaned.encode()


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("BP\x00 120/80\x07", "BP 120/80"),
        ("one\r\ntwo\rthree\x0cfour", "one\ntwo\nthree\nfour"),
        ("cafe\u0301 au lait", "café au lait"),
        ("\ufeff  dose:\t5 mg \n", "dose:\t5 mg"),
    ],
)
def test_line_ends_controls_and_composition(raw: str, cleaned: str) -> None:
    assert clean_text(raw, 1, 100) == cleaned


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n\x00 ", Reason.EMPTY),
        ("abcd", Reason.TOO_SHORT),
        ("a" * 101, Reason.TOO_LONG),
        ("\ufb2c" * 50, Reason.TOO_LONG),  # 50 characters, 150 in normal form
        ("half a pair \ud83d", Reason.ENCODING),
    ],
)
def test_reason_for_refusal(text: str, reason: Reason) -> None:
    with pytest.raises(BadRecord) as caught:
        clean_text(text, 5, 100)
    assert caught.value.reason == reason


@pytest.mark.parametrize("unit", ["\u0327\u0301", "e\u0301", "\r\n", " ", "\x00", "\u0301"])
def test_a_long_note_is_quick(unit: str) -> None:
    start = time.perf_counter()
    _attempt(clean_text, "a" + unit * 100_000, 1, 300_000)
    # normal form alone would take half a minute on the first
    assert time.perf_counter() - start < 2


@hypothesis_settings(deadline=None)
@given(
    st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), ANY_TEXT, st.lists(ANY_TEXT))
)
def test_an_id_is_one_short_line(value: object) -> None:
    found = _attempt(clean_id, value, "mrn")
    if isinstance(found, BadRecord):
        assert found.reason == Reason.ENCODING or found.reason.endswith(": mrn")
        return
    assert found is None or (0 < len(found) <= 3 * MAX_ID and found == " ".join(found.split()))


@pytest.mark.parametrize(
    ("value", "found"),
    [(7, "7"), (7.0, "7"), (" A  1 ", "A 1"), ("", None), (None, None), (float("nan"), None)],
)
def test_ids_of_every_type_that_tables_hold(value: object, found: str | None) -> None:
    assert clean_id(value, "mrn") == found


@pytest.mark.parametrize("value", [True, 1.5, float("inf"), ["a"], "x" * (MAX_ID + 1), 10**MAX_ID])
def test_what_is_no_id(value: object) -> None:
    with pytest.raises(BadRecord):
        clean_id(value, "mrn")
