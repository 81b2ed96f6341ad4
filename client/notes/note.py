"""A clinical note, what was wrong with records that are not notes, and the two together.

No representation shows text: a note in a traceback is a breach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

Units = dict[str, tuple["Note", ...]]


@dataclass(frozen=True, repr=False)
class Note:
    """One note. ``patient_id`` and ``hospital`` are None where the source does not carry them."""

    note_id: str
    patient_id: str | None
    text: str
    hospital: str | None
    origin: str  # file, and line where there are lines

    def __repr__(self) -> str:
        return f"Note({self.origin}, {len(self.text)} characters)"


@dataclass(frozen=True)
class Rejected:
    """A record that did not become a note. ``reason`` is from a fixed list; it never quotes."""

    file: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, repr=False)
class NoteSet:
    """Everything that was read: notes and rejected records together are all records."""

    notes: tuple[Note, ...]
    rejected: tuple[Rejected, ...]
    has_patients: bool

    def __repr__(self) -> str:
        return f"NoteSet({len(self.notes)} notes, {len(self.rejected)} rejected)"

    def units(self) -> Units:
        """Notes by patient, in order of first appearance; by note where there are no patient ids."""
        grouped: dict[str, list[Note]] = {}
        for note in self.notes:
            grouped.setdefault(note.patient_id or note.note_id, []).append(note)
        return {unit: tuple(notes) for unit, notes in grouped.items()}

    def problems(self) -> Iterator[str]:
        """One line a kind of problem: how often, and where first. No text of any note."""
        counts = Counter(r.reason for r in self.rejected)
        for reason, count in counts.most_common():
            where = [str(r) for r in self.rejected if r.reason == reason][:3]
            more = ", ..." if count > len(where) else ""
            yield f"{count} x {reason}: {', '.join(where)}{more}"
