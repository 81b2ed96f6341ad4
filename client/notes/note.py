"""A note, a record that could not become one, and the set of both.

Guarantee: nothing here shows the text of a note. A note's repr names only the place it was read
from, because ids and hospital names come from configurable fields and a wrong field may hold text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a record is not a note. Some are followed by ``: NAME``, a configured or FHIR field."""

    BROKEN_JSON = "broken JSON"
    NOT_AN_OBJECT = "not a JSON object"
    BROKEN_CSV = "broken CSV"
    WRONG_COLUMNS = "wrong number of columns"
    UNREADABLE = "unreadable file"
    ENCODING = "wrong encoding"
    BROKEN_BASE64 = "broken base64"
    FIELD_MISSING = "field missing"
    FIELD_NOT_TEXT = "field not text"
    FIELD_TOO_LONG = "field too long"
    RESOURCE_TYPE = "wrong resource type"
    ATTACHMENT = "attachment not in the export"
    EMPTY = "empty note"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate note id"
    # sound records that were not asked for or hold no text
    WITHDRAWN = "entered in error or superseded"
    OTHER_TYPE = "document type not asked for"
    NO_TEXT = "no text attachment"

    def of(self, field: str) -> str:
        """This reason, for a named field."""
        return f"{self}: {field}"


class NotesError(ValueError):
    """The notes cannot be used. One line: what, where, what to do; never note text."""


class BadRecord(Exception):
    """Raised and caught inside the readers: the record at hand is rejected. Carries no content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, repr=False)
class Note:
    """One clinical note: NFC text without control characters, within the configured length.

    ``origin`` is ``file:line`` (or the file), relative to the configured path. ``patient_id`` and
    ``hospital`` are None where no field for them is configured.
    """

    note_id: str
    patient_id: str | None
    text: str
    hospital: str | None
    origin: str

    @property
    def unit(self) -> str:
        """Whose note this is: its patient, or where there are no patient ids, its own content.

        A place in a file would not do: it moves when other notes come or go, and with it the
        decision who is held out.
        """
        return self.patient_id or hashlib.sha256(self.text.encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Note({self.origin})"


Units = dict[str, tuple[Note, ...]]
"""Unit id -> its notes. The unit is what the privacy guarantee is about: a patient or a note."""


@dataclass(frozen=True)
class Rejected:
    """A record that is bad. ``line`` counts from 1; a Parquet file has rows for lines."""

    file: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class LeftOut:
    """A sound record that is no note here: withdrawn, not asked for, or without text."""

    file: str
    line: int | None
    reason: str


Outcome = Note | Rejected | LeftOut
"""What becomes of one record. Readers give exactly one for each record they meet."""


@dataclass(frozen=True, repr=False)
class NoteSet:
    """Everything that was read, in reading order; every record is in exactly one of the three."""

    notes: tuple[Note, ...]
    rejected: tuple[Rejected, ...]
    has_patients: bool  # False: no patient ids, so the privacy unit can only be the note
    left_out: tuple[LeftOut, ...] = ()

    def __repr__(self) -> str:
        return f"NoteSet({len(self.notes)} notes, {len(self.rejected)} rejected)"

    @property
    def records(self) -> int:
        """Number of records met: notes, rejected and left out."""
        return len(self.notes) + len(self.rejected) + len(self.left_out)

    def units(self) -> Units:
        """Notes by ``Note.unit``, in order of first appearance."""
        grouped: dict[str, list[Note]] = {}
        for note in self.notes:
            grouped.setdefault(note.unit, []).append(note)
        return {unit: tuple(notes) for unit, notes in grouped.items()}

    def counts(self) -> Counter[str]:
        """Number of rejected and left out records by reason."""
        return Counter(r.reason for r in self.rejected) + Counter(r.reason for r in self.left_out)

    def problems(self, places: int = 3) -> Iterator[str]:
        """One line a reason for rejection: how often, and where first. No text of any note."""
        for reason, count in Counter(r.reason for r in self.rejected).most_common():
            met = [str(r) for r in self.rejected if r.reason == reason]
            more = ", ..." if count > places else ""
            yield f"{count} x {reason}: {', '.join(met[:places])}{more}"
