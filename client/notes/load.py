"""Notes from any source: ``load_notes`` is what the rest of the client calls.

Guarantee: every record that a reader meets ends as a note, rejected or left out; nothing is lost,
nothing is read twice under one id, and no log, message or exception holds note text.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from client.notes.fhir import read_fhir
from client.notes.note import LeftOut, Note, NotesError, NoteSet, Outcome, Reason, Rejected
from client.notes.tabular import read_csv, read_jsonl, read_parquet
from client.notes.text_folder import read_text_folder
from conf.schema import NotesSettings

__all__ = ["NotesError", "checked_path", "load_notes"]

log = logging.getLogger(__name__)

_READERS: Mapping[str, Callable[[Path, NotesSettings], Iterator[Outcome]]] = {
    "fhir": read_fhir,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "text": read_text_folder,
}
# Sources whose fields have fixed names.
_FIXED: Mapping[str, Mapping[str, tuple[str | None, ...]]] = {
    "fhir": {
        "patient_field": (None, "subject"),
        "note_field": (None, "id"),
        "hospital_field": (None, "department", "serviceProvider"),
    },
    "text": {
        "patient_field": (None, "folder"),
        "note_field": (None,),
        "hospital_field": (None, "folder"),
    },
}


def load_notes(settings: NotesSettings) -> NoteSet:
    """All notes of the source; what was rejected is logged by count and place.

    FHIR always gives patient ids, whatever ``patient_field`` says. Raises NotesError, one line,
    where the settings cannot be met, there is no usable note, or ``on_bad_record=refuse`` and a
    record is bad.
    """
    path = checked_path(settings)
    outcomes = _without_duplicates(list(_READERS[settings.source](path, settings)))
    found = NoteSet(
        notes=tuple(o for o in outcomes if isinstance(o, Note)),
        rejected=tuple(o for o in outcomes if isinstance(o, Rejected)),
        has_patients=settings.names_patients,
        left_out=tuple(o for o in outcomes if isinstance(o, LeftOut)),
    )
    _require_usable(found, path, settings)
    for problem in found.problems():
        log.warning("notes rejected: %s", problem)
    return found


def _without_duplicates(outcomes: list[Outcome]) -> list[Outcome]:
    """Reject copies of a note, and every note whose id stands for different texts.

    To keep the first of several different ones would let one note that is added remove another:
    two units would change where the guarantee speaks of one. An id is a patient's own.
    """
    texts: dict[tuple[str | None, str], set[str]] = defaultdict(set)
    for outcome in outcomes:
        if isinstance(outcome, Note):
            texts[outcome.patient_id, outcome.note_id].add(outcome.text)
    seen = set()
    kept: list[Outcome] = []
    for outcome in outcomes:
        if isinstance(outcome, Note):
            key = (outcome.patient_id, outcome.note_id)
            if key in seen or len(texts[key]) > 1:
                kept.append(_duplicate(outcome))
                continue
            seen.add(key)
        kept.append(outcome)
    return kept


def _duplicate(note: Note) -> Rejected:
    file, _, line = note.origin.rpartition(":")
    if line.isdecimal():
        return Rejected(file, int(line), Reason.DUPLICATE)
    return Rejected(note.origin, None, Reason.DUPLICATE)  # a file without lines


def checked_path(settings: NotesSettings) -> Path:
    """The path, once it is there and the settings fit the source. Raises NotesError."""
    if settings.source == "clinosim" or settings.path is None:
        raise NotesError(
            "notes.source=clinosim or no notes.path: name the notes to be read; simulated ones are "
            "made by `wardround simulate` and `audit` only"
        )
    path = settings.path.expanduser()
    if not path.exists():
        raise NotesError(f"notes.path={path}: no such file or folder; point it at your notes")
    if not _is_encoding(settings.encoding):
        raise NotesError(f"notes.encoding={settings.encoding}: no such encoding; try utf-8")
    for field, allowed in _FIXED.get(settings.source, {}).items():
        value = getattr(settings, field)
        if value not in allowed:
            names = ", ".join(name or "null" for name in allowed)
            raise NotesError(f"notes.{field}={value}: notes={settings.source} allows {names}")
    if settings.document_types and settings.source != "fhir":
        raise NotesError("notes.document_types: only notes=fhir knows document types; set []")
    return path


def _is_encoding(name: str) -> bool:
    try:
        b"note".decode(name)
    except UnicodeError:
        return True  # known, if not made for these bytes
    except (LookupError, ValueError):
        return False
    return True


def _require_usable(found: NoteSet, path: Path, settings: NotesSettings) -> None:
    counts = ", ".join(f"{count} {reason}" for reason, count in found.counts().most_common())
    if found.rejected and settings.on_bad_record == "refuse":
        first = found.rejected[0]
        raise NotesError(
            f"notes.path={path}: {first}: {first.reason}; {len(found.rejected)} of {found.records} "
            f"records rejected ({counts}); repair them or set notes.on_bad_record=skip"
        )
    if not found.notes:
        hint = f" ({counts}); check notes.*_field, notes.encoding and lengths" if counts else ""
        raise NotesError(f"notes.path={path}: no usable note among {found.records} records{hint}")
