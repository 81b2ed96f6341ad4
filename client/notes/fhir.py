"""A FHIR R4 bulk export: a folder of NDJSON files, one resource a line.

Notes are Compositions and DocumentReferences, in that order, then by file name and line; a note's
id is ``Type/id``. Files are known by the type in their name (``DocumentReference.ndjson``,
``DocumentReference-1.ndjson``, ``2.DocumentReference.ndjson.gz``). The privacy unit is the person:
patients that the export links to each other (Patient.link) count as one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from client.notes.clean import clean_id, clean_text
from client.notes.fhir_document import (
    Resource,
    attachment_text,
    child,
    composition_text,
    decode_base64,
    is_withdrawn,
    items,
    reference_id,
    string,
    type_names,
)
from client.notes.files import MAX_LINE, read_json_lines, shown
from client.notes.note import BadRecord, LeftOut, Note, NotesError, Outcome, Reason, Rejected
from conf.schema import NotesSettings

Kind = Literal["Composition", "DocumentReference", "Encounter", "Patient", "Binary"]
DOCUMENTS: tuple[Kind, ...] = ("Composition", "DocumentReference")


@dataclass(frozen=True)
class _Export:
    """What documents refer to."""

    folder: Path
    person: Mapping[str, str]  # patient id -> the id that stands for the person, where linked
    encounters: Mapping[str, Resource]
    binaries: Mapping[str, Resource]

    def fetch(self, url: str) -> bytes:
        """Bytes behind an attachment's url: a Binary of the export or a file inside its folder.

        Raises BadRecord for everything else; nothing is read from outside, not even by a link.
        """
        binary = self.binaries.get(reference_id(url, "Binary") or "")
        if binary is not None:
            return decode_base64(string(binary, "data"))
        try:
            file = (self.folder / unquote(url)).resolve()
            inside = file.is_relative_to(self.folder.resolve()) and file.is_file()
            if inside and file.stat().st_size <= MAX_LINE:
                return file.read_bytes()
        except (OSError, ValueError):  # ValueError: a NUL in the url
            inside = False
        raise BadRecord(Reason.TOO_LONG if inside else Reason.ATTACHMENT)


def read_fhir(path: Path, settings: NotesSettings) -> Iterator[Outcome]:
    """One outcome for each document, after those for broken lines of what documents refer to.

    Raises NotesError where the path is no folder or has no documents.
    """
    if not path.is_dir():
        raise NotesError(f"notes.path={path}: not a folder; a FHIR export is a folder of *.ndjson")
    if not any(_files(path, kind) for kind in DOCUMENTS):
        raise NotesError(
            f"notes.path={path}: no DocumentReference*.ndjson or Composition*.ndjson (.gz) here; "
            "export these types, with Patient and Encounter"
        )
    rejected: list[Rejected] = []
    export = _Export(
        folder=path,
        person=_persons(_sound(path, "Patient", rejected)),
        encounters=_by_id(path, "Encounter", rejected) if settings.hospital_field else {},
        binaries=_by_id(path, "Binary", rejected),
    )
    yield from rejected
    wanted = {name.casefold() for name in settings.document_types}
    for kind in DOCUMENTS:
        for file, line, resource in _resources(path, kind):
            if isinstance(resource, Reason):
                yield Rejected(file, line, resource)
            elif is_withdrawn(resource):
                yield LeftOut(file, line, Reason.WITHDRAWN)
            elif wanted and wanted.isdisjoint(type_names(resource)):
                yield LeftOut(file, line, Reason.OTHER_TYPE)
            else:
                yield _document(kind, resource, export, file, line, settings)


def _document(
    kind: Kind, resource: Resource, export: _Export, file: str, line: int, settings: NotesSettings
) -> Outcome:
    try:
        note_id = clean_id(resource.get("id"), "id")
        patient = reference_id(child(resource, "subject").get("reference"), "Patient")
        if note_id is None or patient is None:
            missing = "subject.reference" if note_id else "id"
            raise BadRecord(Reason.FIELD_MISSING.of(missing))
        text: str | None
        if kind == "Composition":
            text = composition_text(resource, settings.max_chars)
        else:
            text = attachment_text(resource, export.fetch, settings.encoding, settings.max_chars)
        if text is None:
            return LeftOut(file, line, Reason.NO_TEXT)
        return Note(
            note_id=f"{kind}/{note_id}",
            patient_id=export.person.get(patient, patient),
            text=clean_text(text, settings.min_chars, settings.max_chars),
            hospital=_hospital(resource, export, settings.hospital_field),
            origin=f"{file}:{line}",
        )
    except BadRecord as bad:
        return Rejected(file, line, bad.reason)
    except RecursionError:  # sections in sections, deeper than any document
        return Rejected(file, line, Reason.BROKEN_JSON)


# --- what documents refer to ---


def _hospital(resource: Resource, export: _Export, field: str | None) -> str | None:
    """What the note's encounter says about the hospital. Raises BadRecord where nothing does."""
    if field is None:
        return None
    named = [child(resource, "encounter"), *items(child(resource, "context").get("encounter"))]
    for reference in (string(r, "reference") for r in named):
        encounter = _contained(resource, reference) or export.encounters.get(
            reference_id(reference, "Encounter") or ""
        )
        if encounter and (hospital := _HOSPITAL[field](encounter)):
            return hospital
    raise BadRecord(Reason.FIELD_MISSING.of(field))


def _contained(resource: Resource, reference: str) -> Resource | None:
    inner = items(resource.get("contained"))
    return next((r for r in inner if reference and reference == f"#{string(r, 'id')}"), None)


def _department(encounter: Resource) -> str | None:
    service = child(encounter, "serviceType")
    names = [string(service, "text"), *(string(c, "display") for c in items(service.get("coding")))]
    return clean_id(next(filter(None, names), None), "serviceType")


def _provider(encounter: Resource) -> str | None:
    return reference_id(child(encounter, "serviceProvider").get("reference"), "Organization")


_HOSPITAL: Mapping[str, Callable[[Resource], str | None]] = {
    "department": _department,
    "serviceProvider": _provider,
}


def _persons(patients: Iterable[Resource]) -> dict[str, str]:
    """Patient id -> the first id, in sort order, of the same person; linked patients only.

    Every type of Patient.link (replaced-by, replaces, refer, seealso) states "the same person". A
    patient may come more than once, as in an export of versions: every link that was ever stated
    counts, for two people taken for one are protected together, one taken for two is not.
    """
    person: dict[str, str] = {}

    def root(patient: str) -> str:
        while person.get(patient, patient) != patient:
            patient = person[patient]
        return patient

    for resource in patients:
        patient = string(resource, "id")
        for link in items(resource.get("link")):
            other = reference_id(child(link, "other").get("reference"), "Patient")
            if other is not None:
                first, second = sorted((root(patient), root(other)))
                person[first] = person[second] = first
    return {patient: root(patient) for patient in person}


# --- files ---


def _files(folder: Path, kind: Kind) -> list[Path]:
    """Files with the type as a word in their name, in name order."""
    name = re.compile(rf"(?<![A-Za-z]){kind}(?![A-Za-z]).*\.(ndjson|jsonl)(\.gz)?$")
    return [f for f in sorted(folder.iterdir()) if name.search(f.name) and f.is_file()]


def _resources(folder: Path, kind: Kind) -> Iterator[tuple[str, int, Resource | Reason]]:
    """File name, line and the resource on it, or why there is none. NDJSON is always UTF-8."""
    for file in _files(folder, kind):
        for line, resource in read_json_lines(file, "utf-8"):
            if isinstance(resource, dict) and resource.get("resourceType") != kind:
                yield shown(file.name), line, Reason.RESOURCE_TYPE
            else:
                yield shown(file.name), line, resource


def _by_id(folder: Path, kind: Kind, rejected: list[Rejected]) -> dict[str, Resource]:
    """Resources of a type by id, the last of each; broken lines are added to ``rejected``."""
    return {string(resource, "id"): resource for resource in _sound(folder, kind, rejected)}


def _sound(folder: Path, kind: Kind, rejected: list[Rejected]) -> Iterator[Resource]:
    """Resources of a type; broken lines are added to ``rejected``."""
    for file, line, resource in _resources(folder, kind):
        if isinstance(resource, Reason):
            rejected.append(Rejected(file, line, resource))
        else:
            yield resource
