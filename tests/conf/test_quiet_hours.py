"""Quiet hours: which minutes of the week a window holds, and what is no window."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.quiet_hours import DAYS, Window, is_quiet, parse

MONDAY = datetime(2026, 11, 16)
WEEK = 7 * 24 * 60


def held(*windows: str) -> set[int]:
    """Minutes of the week, from Monday 00:00, that lie in the windows."""
    parsed = [parse(text) for text in windows]
    return {m for m in range(WEEK) if any(w.holds(MONDAY + timedelta(minutes=m)) for w in parsed)}


@pytest.mark.parametrize(
    ("text", "quiet", "not_quiet"),
    [
        ("07:00-19:00", ["Mon 07:00", "Sun 18:59"], ["Mon 06:59", "Sun 19:00"]),
        ("Mon-Fri 07:00-19:00", ["Mon 07:00", "Fri 18:59"], ["Sat 12:00", "Sun 12:00"]),
        ("Sat,Sun 00:00-24:00", ["Sat 00:00", "Sun 23:59"], ["Fri 23:59", "Mon 00:00"]),
        ("22:00-06:00", ["Wed 22:00", "Wed 23:59", "Wed 05:59"], ["Wed 06:00", "Wed 21:59"]),
        ("Fri 22:00-06:00", ["Fri 22:00", "Sat 05:59"], ["Fri 05:59", "Sat 06:00", "Sat 22:00"]),
        ("Sun 22:00-06:00", ["Sun 22:00", "Mon 05:59"], ["Sun 05:59", "Mon 06:00"]),
        ("Sat-Mon 12:00-13:00", ["Sat 12:00", "Sun 12:00", "Mon 12:59"], ["Tue 12:00"]),
        ("Tue 00:00-00:01", ["Tue 00:00"], ["Tue 00:01", "Mon 00:00"]),
    ],
)
def test_a_window_holds_its_first_minute_and_not_its_last(
    text: str, quiet: list[str], not_quiet: list[str]
) -> None:
    for moments, expected in ((quiet, True), (not_quiet, False)):
        for moment in moments:
            day, _, clock = moment.partition(" ")
            hour, minute = map(int, clock.split(":"))
            when = MONDAY + timedelta(days=DAYS.index(day), hours=hour, minutes=minute)
            assert is_quiet(when, [text]) is expected, moment


@given(
    days=st.frozensets(st.integers(0, 6), min_size=1),
    begin=st.integers(0, 24 * 60 - 1),
    length=st.integers(1, 24 * 60 - 1),
)
def test_a_window_holds_as_many_minutes_as_it_is_long(
    days: frozenset[int], begin: int, length: int
) -> None:
    end = (begin + length) % (24 * 60) or 24 * 60
    clock = "-".join(f"{m // 60:02}:{m % 60:02}" for m in (begin, end))
    text = f"{','.join(DAYS[d] for d in sorted(days))} {clock}"
    assert parse(text) == Window(days, begin, end)
    expected = {(d * 24 * 60 + begin + i) % WEEK for d in days for i in range(length)}
    assert held(text) == expected


def test_several_windows_add_up() -> None:
    assert held("07:00-19:00", "Sat 00:00-24:00") == held("07:00-19:00") | held("Sat 00:00-24:00")
    assert not is_quiet(MONDAY, [])


@pytest.mark.parametrize(
    "text",
    ["", "07:00", "7:00-19:00", "07:00-19:60", "24:00-07:00", "07:00-24:01", "07:00-07:00",
     "mon 07:00-19:00", "Mon- 07:00-19:00", "Mon-Fri07:00-19:00", "25:00-26:00",
     "07:00-19:00\n"],
)  # fmt: skip
def test_what_is_no_window_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"write it as|must begin"):
        parse(text)
