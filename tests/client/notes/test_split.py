"""The held-out side of a patient never changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from client.notes.note import Note, Units
from client.notes.split import split_units

NAMES = st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=30)


def _units(names: list[str]) -> Units:
    return {name: (Note(f"n-{name}", name, "Seen in clinic.", None, "f:1"),) for name in names}


@hypothesis_settings(deadline=None)
@given(NAMES, NAMES, st.floats(0.01, 0.99), st.text(max_size=5))
def test_growth_and_order_move_nobody(
    names: list[str], more: list[str], holdout: float, salt: str
) -> None:
    train, held_out = split_units(_units(names), holdout, salt)
    assert not train.keys() & held_out.keys()
    assert [n for n in names if n in train] == list(train)
    assert sorted([*train, *held_out]) == sorted(names)

    grown_train, grown_held_out = split_units(_units([*more, *reversed(names)]), holdout, salt)
    assert train.keys() <= grown_train.keys()
    assert held_out.keys() <= grown_held_out.keys()


def test_a_larger_share_holds_out_more_and_keeps_those_already_out() -> None:
    units = _units([f"patient {i}" for i in range(2000)])
    fifth, half = (split_units(units, share, "s")[1] for share in (0.2, 0.5))
    assert fifth.keys() < half.keys()
    assert abs(len(fifth) - 400) < 90  # five standard deviations
    assert abs(len(half) - 1000) < 112


def test_another_salt_is_another_split() -> None:
    units = _units([f"patient {i}" for i in range(500)])
    assert split_units(units, 0.5, "a")[1].keys() != split_units(units, 0.5, "b")[1].keys()


@pytest.mark.parametrize("holdout", [0.0, 1.0, -1.0])
def test_impossible_share(holdout: float) -> None:
    with pytest.raises(ValueError, match="holdout"):
        split_units({}, holdout)
