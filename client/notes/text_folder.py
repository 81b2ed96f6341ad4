"""A folder of text files: FOLDER[/HOSPITAL][/PATIENT]/.../NOTE.txt, one note a file.

The first folder below the path names the hospital (``hospital_field=folder``), the next one the
patient (``patient_field=folder``); deeper folders only order the files. The note's id is its path.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from client.notes.clean import clean_id, clean_text
from client.notes.files import MAX_LINE, shown
from client.notes.note import BadRecord, Note, NotesError, Outcome, Reason, Rejected
from conf.schema import NotesSettings


def read_text_folder(path: Path, settings: NotesSettings) -> Iterator[Outcome]:
    """One outcome for each ``*.txt`` file at any depth, in path order. Raises NotesError."""
    if not path.is_dir():
        raise NotesError(
            f"notes.path={path}: not a folder; notes=text reads the *.txt files of one"
        )
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() == ".txt" and f.is_file())
    if not files:
        raise NotesError(f"notes.path={path}: the folder and those in it have no *.txt file")
    for file in files:
        yield _outcome(file, file.relative_to(path), settings)


def _outcome(file: Path, relative: Path, settings: NotesSettings) -> Outcome:
    name = shown(relative.as_posix())
    folders = list(relative.parent.parts)
    try:
        hospital = _folder(folders, "hospital_field", settings.hospital_field)
        patient = _folder(folders, "patient_field", settings.patient_field)
        text = clean_text(_text(file, settings.encoding), settings.min_chars, settings.max_chars)
        return Note(name, patient, text, hospital, origin=name)
    except BadRecord as bad:
        return Rejected(name, None, bad.reason)


def _folder(folders: list[str], setting: str, value: str | None) -> str | None:
    """Take the next folder name if the setting asks for it; BadRecord where there is none."""
    if value is None:
        return None
    name = clean_id(shown(folders.pop(0)), setting) if folders else None
    if name is None:
        raise BadRecord(Reason.FIELD_MISSING.of(f"folder for {setting}"))
    return name


def _text(file: Path, encoding: str) -> str:
    reason = Reason.ENCODING
    try:
        if file.stat().st_size > MAX_LINE:
            reason = Reason.TOO_LONG
        else:
            return file.read_bytes().removeprefix(codecs.BOM_UTF8).decode(encoding)
    except UnicodeError:
        pass
    except OSError:
        reason = Reason.UNREADABLE
    raise BadRecord(reason)  # outside the handlers: a UnicodeDecodeError holds the whole file
