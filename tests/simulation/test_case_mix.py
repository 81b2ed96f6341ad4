"""Case mix: chapters of ICD-10-CM, and the distance between count tables."""

from __future__ import annotations

from collections import Counter
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.case_mix import chapter, distance, is_icd10

tables = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 50), min_size=1).map(Counter)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("B99.9", "infectious"),
        ("C00.0", "neoplasm"),
        ("D49.9", "neoplasm"),
        ("D50.0", "blood"),
        ("E11.9", "endocrine or metabolic"),
        ("H59.8", "eye"),
        ("H60.00", "ear"),
        ("I10", "circulatory"),
        ("T88.9XXA", "injury"),
        ("U07.1", "special purpose"),
        ("W54.0XXA", "external cause"),
        ("Z00.00", "health status"),
    ],
)
def test_chapter_of_the_codes_at_its_borders(code: str, name: str) -> None:
    assert chapter(code) == name


@pytest.mark.parametrize("text", ["copd_exacerbation", "", "I1", "10I", "I10.", "i10"])
def test_what_is_no_code_is_refused(text: str) -> None:
    assert not is_icd10(text)
    with pytest.raises(ValueError, match="is not an ICD-10-CM code"):
        chapter(text)


@given(tables, tables, tables)
def test_distance_is_a_metric_between_0_and_1(
    one: Counter[str], two: Counter[str], three: Counter[str]
) -> None:
    assert distance(one, one) == pytest.approx(0, abs=1e-7)
    assert distance(one, two) == pytest.approx(distance(two, one))
    assert 0 <= distance(one, two) <= 1 + 1e-12
    assert distance(one, three) <= distance(one, two) + distance(two, three) + 1e-9


def test_distance_of_known_tables() -> None:
    assert distance(Counter("aa"), Counter("b")) == pytest.approx(1)
    assert distance(Counter("ab"), Counter("aabb")) == pytest.approx(0, abs=1e-7)
    # p = (1, 0), q = (1/2, 1/2): JSD = (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2 bits
    assert distance(Counter("a"), Counter("ab")) == pytest.approx(sqrt(0.3112781245))
