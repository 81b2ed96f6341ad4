"""Quiet hours: weekly windows of local time, such as ``Mon-Fri 07:00-19:00`` or ``22:00-06:00``.

A window holds its first minute and not its last. One that ends before it begins goes on past
midnight and belongs to the day on which it begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_DAY = f"(?:{'|'.join(DAYS)})"
_PART = f"{_DAY}(?:-{_DAY})?"
_CLOCK = r"([01]\d|2[0-4]):([0-5]\d)"
_WINDOW = re.compile(rf"(?:({_PART}(?:,{_PART})*) )?{_CLOCK}-{_CLOCK}")
_MIDNIGHT = 24 * 60


@dataclass(frozen=True)
class Window:
    """``begin`` and ``end`` in minutes after midnight, on the ``days`` (0 is Monday) it begins."""

    days: frozenset[int]
    begin: int
    end: int

    def holds(self, now: datetime) -> bool:
        """Whether the local time ``now`` lies in the window."""
        minute, today = now.hour * 60 + now.minute, now.weekday()
        if self.begin < self.end:
            return today in self.days and self.begin <= minute < self.end
        evening = today in self.days and minute >= self.begin
        return evening or ((today - 1) % 7 in self.days and minute < self.end)


def parse(text: str) -> Window:
    """The window that ``[DAYS ]HH:MM-HH:MM`` means; without days it is every day's.

    Raises ValueError with what is allowed.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(f"'{text}': write it as 'HH:MM-HH:MM' or 'Mon-Fri,Sun HH:MM-HH:MM'")
    begin, end = (int(found[i]) * 60 + int(found[i + 1]) for i in (2, 4))
    if begin >= _MIDNIGHT or end > _MIDNIGHT or begin == end:
        raise ValueError(f"'{text}': must begin before 24:00, end by 24:00, and not be empty")
    return Window(_days(found[1]), begin, end)


def is_quiet(now: datetime, windows: Iterable[str]) -> bool:
    """Whether the local time ``now`` lies in any of the windows."""
    return any(parse(text).holds(now) for text in windows)


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    days: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        start = DAYS.index(first)
        length = (DAYS.index(last or first) - start) % 7 + 1  # Sat-Mon runs over the week's end
        days |= {(start + i) % 7 for i in range(length)}
    return frozenset(days)
