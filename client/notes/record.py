"""From a raw record to a note: the checks that every source shares."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from client.notes.note import Note, NoteSet, Rejected
from conf.schema import NotesSettings

_KEPT_CONTROLS = {"\n", "\t"}


class NotesError(ValueError):
    """The notes cannot be used; one line says what, where and what to do, without any text."""


@dataclass(frozen=True, repr=False)
class Raw:
    """What a reader found at one place: fields, or the reason why there are none."""

    file: str
    line: int | None
    fields: dict[str, Any] | None
    reason: str = ""


def collect(records: Iterable[Raw], settings: NotesSettings) -> NoteSet:
    """Check every record; nothing is lost: each becomes a note or a rejection.

    Raises NotesError when nothing usable is left, or when ``on_bad_record`` is "refuse" and
    something was rejected.
    """
    notes: list[Note] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    for raw in records:
        outcome = _check(raw, settings, seen)
        if isinstance(outcome, Note):
            notes.append(outcome)
        else:
            rejected.append(outcome)
    found = NoteSet(tuple(notes), tuple(rejected), settings.patient_field is not None)
    if settings.on_bad_record == "refuse" and rejected:
        raise NotesError(
            f"notes.on_bad_record=refuse: {len(rejected)} bad records, "
            f"the first at {rejected[0]} ({rejected[0].reason})"
        )
    if not notes:
        why = next(found.problems(), "no records")
        raise NotesError(f"notes.path={settings.path}: no usable note ({why})")
    return found


def _check(raw: Raw, settings: NotesSettings, seen: set[str]) -> Note | Rejected:
    def reject(reason: str) -> Rejected:
        return Rejected(raw.file, raw.line, reason)

    if raw.fields is None:
        return reject(raw.reason)
    text = raw.fields.get(settings.text_field)
    if text is None:
        return reject(f"field missing: {settings.text_field}")
    if not isinstance(text, str):
        return reject(f"not text: {settings.text_field}")
    if len(text) > settings.max_chars:
        return reject("too long (notes.max_chars)")
    text = clean(text)
    if not text:
        return reject("empty note")
    if len(text) < settings.min_chars:
        return reject("too short (notes.min_chars)")
    values = {}
    for name, field in (("patient", settings.patient_field), ("hospital", settings.hospital_field)):
        value = raw.fields.get(field) if field else None
        if field and value in (None, ""):
            return reject(f"field missing: {field}")
        values[name] = None if value is None else str(value)
    own = raw.fields.get(settings.note_field) if settings.note_field else None
    if settings.note_field and own in (None, ""):
        return reject(f"field missing: {settings.note_field}")
    origin = f"{raw.file}:{raw.line}" if raw.line else raw.file
    note_id = origin if own is None else str(own)
    if note_id in seen:
        return reject("note id used before")
    seen.add(note_id)
    return Note(note_id, values["patient"], text, values["hospital"], origin)


def clean(text: str) -> str:
    """NFC, without control characters other than newline and tab, stripped at both ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = (c for c in text if c in _KEPT_CONTROLS or unicodedata.category(c) != "Cc")
    return unicodedata.normalize("NFC", "".join(kept)).strip()
