"""FHIR R4 bulk export: a folder of NDJSON files, one resource a line.

Notes are DocumentReference attachments (base64 ``data``, text/plain or HTML) and Compositions
(nested sections of XHTML). Only the few elements named here are read, so any vendor's export with
standard resources works; full schema validation would reject notes over elements nobody reads.
Specification: hl7.org/fhir/R4 (DocumentReference, Composition) and the Bulk Data Access guide.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from client.notes.record import NotesError, Raw
from client.notes.tabular import read_jsonl

_BLOCK = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul", "ol"}
_NOT_NOTES = {"entered-in-error", "superseded"}
Resource = dict[str, Any]


def read_fhir(folder: Path, text_field: str, document_types: tuple[str, ...]) -> Iterator[Raw]:
    """Every document of the export, DocumentReferences first, in file order.

    Fields: the text, ``subject`` (patient reference), ``id``, and ``department`` and
    ``serviceProvider`` of the encounter. Raises NotesError when there is no document file.
    """
    files = [*_files(folder, "DocumentReference"), *_files(folder, "Composition")]
    if not files:
        raise NotesError(
            f"notes.path={folder}: no DocumentReference*.ndjson or Composition*.ndjson in it"
        )
    encounters = _encounters(folder)
    for file in files:
        for raw in read_jsonl(file, "utf-8"):
            if raw.fields is None:
                yield raw
            elif raw.fields.get("resourceType") not in ("DocumentReference", "Composition"):
                yield Raw(raw.file, raw.line, None, "not a document resource")
            elif _wanted(raw.fields, document_types):
                yield _document(raw, text_field, encounters, folder)


def _document(raw: Raw, text_field: str, encounters: dict[str, Resource], folder: Path) -> Raw:
    resource = raw.fields or {}
    try:
        if resource["resourceType"] == "Composition":
            text: str | None = "\n\n".join(_sections(resource.get("section") or []))
        else:
            text = _attachments(resource.get("content") or [], folder)
    except (binascii.Error, UnicodeDecodeError):
        return Raw(raw.file, raw.line, None, "attachment cannot be decoded")
    except (AttributeError, KeyError, TypeError, ValueError):
        return Raw(raw.file, raw.line, None, "not a valid document resource")
    if text is None:
        return Raw(raw.file, raw.line, None, "no readable text attachment")
    encounter = encounters.get(_encounter_of(resource), {})
    fields = {
        text_field: text,
        "id": f"{resource['resourceType']}/{resource.get('id') or raw.line}",
        "subject": _reference(resource.get("subject")),
        "department": _text(encounter.get("serviceType")),
        "serviceProvider": _reference(encounter.get("serviceProvider")),
    }
    return Raw(raw.file, raw.line, fields)


def _wanted(resource: Resource, document_types: tuple[str, ...]) -> bool:
    if {resource.get("status"), resource.get("docStatus")} & _NOT_NOTES:
        return False
    if not document_types:
        return True
    kind = resource.get("type") or {}
    names = {kind.get("text")}
    names |= {c.get(key) for c in kind.get("coding") or [] for key in ("code", "display")}
    return bool(names & set(document_types))


def _sections(sections: list[Resource]) -> Iterator[str]:
    """Title and text of every section, depth first."""
    for section in sections:
        body = plain_text((section.get("text") or {}).get("div") or "")
        title = section.get("title") or ""
        if body:
            yield f"{title}: {body}" if title else body
        yield from _sections(section.get("section") or [])


def _attachments(content: list[Resource], folder: Path) -> str | None:
    """Text of all readable attachments; None when there is none."""
    parts = []
    for item in content:
        attachment = item.get("attachment") or {}
        kind = (attachment.get("contentType") or "text/plain").partition(";")[0].strip()
        if kind not in ("text/plain", "text/html", "application/xhtml+xml"):
            continue
        if "data" in attachment:
            raw = base64.b64decode(attachment["data"], validate=True)
        elif local := _local(attachment.get("url"), folder):
            raw = local.read_bytes()
        else:
            continue
        text = raw.decode("utf-8")
        parts.append(text if kind == "text/plain" else plain_text(text))
    return "\n\n".join(parts) if parts else None


def _local(url: str | None, folder: Path) -> Path | None:
    """A file inside the export that a relative url names; nothing outside it is ever opened."""
    if not url or "://" in url:
        return None
    path = (folder / url).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None


def _encounters(folder: Path) -> dict[str, Resource]:
    """Encounters by reference; an export without them gives no department."""
    found: dict[str, Resource] = {}
    for file in _files(folder, "Encounter"):
        for raw in read_jsonl(file, "utf-8"):
            if raw.fields and raw.fields.get("id"):
                found[f"Encounter/{raw.fields['id']}"] = raw.fields
    return found


def _encounter_of(resource: Resource) -> str:
    context = resource.get("context")
    of_document = (context.get("encounter") or [None])[0] if isinstance(context, dict) else None
    return _reference(resource.get("encounter") or of_document) or ""


def _reference(value: Any) -> str | None:
    return value.get("reference") if isinstance(value, dict) else None


def _text(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    codings = value.get("coding") or [{}]
    return value.get("text") or codings[0].get("display") or codings[0].get("code")


def _files(folder: Path, kind: str) -> list[Path]:
    """``Kind.ndjson``, ``Kind-1.ndjson``, ``Kind.000.ndjson``, each also with ``.gz``."""
    names = sorted(p for p in folder.glob(f"{kind}*") if p.name.removesuffix(".gz").endswith(".ndjson"))
    return [p for p in names if not p.name[len(kind)].isalpha()]


def plain_text(markup: str) -> str:
    """XHTML or HTML as plain text, a line a block."""
    parser = _PlainText()
    parser.feed(markup)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return "\n".join(line for line in lines if line)


class _PlainText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in ("script", "style")
        if tag in _BLOCK:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style") and self._silent > 0
        if tag in _BLOCK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data.replace("\n", " "))
