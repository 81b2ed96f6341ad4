"""Read the notes that a configuration names."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterable

from client.notes.fhir import read_fhir
from client.notes.note import NoteSet
from client.notes.record import NotesError, Raw, collect
from client.notes.tabular import read_csv, read_jsonl, read_parquet
from client.notes.text_folder import read_text_folder
from conf.schema import NotesSettings

__all__ = ["NotesError", "load_notes"]

log = logging.getLogger(__name__)

_FOLDERS = ("fhir", "text")


def load_notes(settings: NotesSettings) -> NoteSet:
    """All notes of the source; problems are logged by count and place, never by text.

    Raises NotesError with one line when the source is absent, unreadable or without a usable note.
    """
    path = settings.path
    if settings.source == "clinosim" or path is None:
        raise NotesError("notes=clinosim: only `wardround simulate` makes simulated notes")
    if not path.exists():
        raise NotesError(f"notes.path={path}: no such file or folder")
    if (settings.source in _FOLDERS) != path.is_dir():
        needed = "folder" if settings.source in _FOLDERS else "file"
        raise NotesError(f"notes.path={path}: notes={settings.source} needs a {needed}")
    try:
        codecs.lookup(settings.encoding)
    except LookupError:
        raise NotesError(f"notes.encoding={settings.encoding}: no such encoding") from None
    found = collect(_records(settings), settings)
    for problem in found.problems():
        log.warning("notes left out: %s", problem)
    return found


def _records(settings: NotesSettings) -> Iterable[Raw]:
    path = settings.path
    assert path is not None
    match settings.source:
        case "fhir":
            return read_fhir(path, settings.text_field, settings.document_types)
        case "jsonl":
            return read_jsonl(path, settings.encoding)
        case "csv":
            return read_csv(path, settings.encoding)
        case "parquet":
            return read_parquet(path)
        case _:
            return read_text_folder(path, settings.encoding, settings.text_field)
