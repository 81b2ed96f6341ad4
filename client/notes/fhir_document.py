"""The text of one FHIR R4 document: a Composition's narrative or a DocumentReference's attachment.

Plain functions on parsed JSON. A hospital's export may hold anything where the standard wants an
object or a list, so every step treats a value of the wrong type as absent. The standard library is
enough for that; fhir.resources would validate whole resources with pydantic, at many times the
cost, and refuse a note for a defect in a field that no one reads here.
"""

from __future__ import annotations

import base64
import codecs
from collections.abc import Callable, Iterator, Mapping

from client.notes.clean import clean_id
from client.notes.markup import to_text
from client.notes.note import BadRecord, Reason

Resource = Mapping[str, object]

_MARKUP = ("text/html", "application/xhtml+xml")
_MARKUP_FACTOR = 10  # markup may be so many times as long as the text it holds


def items(value: object) -> list[Resource]:
    """The objects in a JSON list; [] for anything else."""
    return [i for i in value if isinstance(i, dict)] if isinstance(value, list) else []


def child(resource: Resource, *path: str) -> Resource:
    """The object at a path of keys; {} where there is none."""
    for key in path:
        value = resource.get(key)
        resource = value if isinstance(value, dict) else {}
    return resource


def string(resource: Resource, key: str) -> str:
    """The string under a key; "" where there is none."""
    value = resource.get(key)
    return value if isinstance(value, str) else ""


def reference_id(reference: object, kind: str) -> str | None:
    """The id that a reference to a resource of this kind names; None where it does not.

    Reads ``Kind/id``, ``https://host/Kind/id/_history/1``, ``urn:uuid:id``; not ``#contained``.
    """
    if not isinstance(reference, str) or reference.startswith("#"):
        return None
    head, _, last = reference.partition("/_history/")[0].strip().rpartition("/")
    if head and head.rpartition("/")[2] != kind:
        return None
    return clean_id(last.removeprefix("urn:uuid:"), f"reference to {kind}")


def type_names(resource: Resource) -> set[str]:
    """Codes, displays and titles of a document's type, in lower case."""
    kind = child(resource, "type")
    names = {string(kind, "text"), string(resource, "title")}
    for coding in items(kind.get("coding")):
        names |= {string(coding, "code"), string(coding, "display")}
    return {name.casefold() for name in names if name}


def is_withdrawn(resource: Resource) -> bool:
    """Whether the document was entered in error or a newer one took its place."""
    states = {string(resource, "status"), string(resource, "docStatus")}
    return not states.isdisjoint({"entered-in-error", "superseded"})


def composition_text(resource: Resource, max_chars: int) -> str:
    """Title, then each section's title and narrative in reading order, nested ones included.

    Sections without text are dropped with their titles. Without any, the narrative of the whole
    document is taken; "" where there is none either. Raises BadRecord (too long).
    """
    narratives = [resource, *_all_sections(resource)]
    if sum(len(_div(n)) for n in narratives) > _MARKUP_FACTOR * max_chars:
        raise BadRecord(Reason.TOO_LONG)
    sections = filter(None, map(_section_text, items(resource.get("section"))))
    body = "\n\n".join(sections) or to_text(_div(resource))
    return f"{string(resource, 'title')}\n\n{body}" if body else ""


def attachment_text(
    resource: Resource, fetch: Callable[[str], bytes], encoding: str, max_chars: int
) -> str | None:
    """The text of the attachment that is plainest: text, else HTML; None where all are other types.

    FHIR gives one document in several formats as several ``content``. ``fetch`` gets the bytes
    behind a ``url``; ``encoding`` holds where the content type names no charset. Raises BadRecord.
    """
    found = [child(content, "attachment") for content in items(resource.get("content"))]
    ranked = [(_rank(_media_type(a)), n) for n, a in enumerate(found) if _rank(_media_type(a)) < 2]
    if not ranked:
        return None
    attachment = found[min(ranked)[1]]
    raw = _attached(attachment, fetch)
    text = _decoded(raw, _charset(attachment) or encoding)
    if _media_type(attachment) not in _MARKUP:
        return text
    if len(text) > _MARKUP_FACTOR * max_chars:
        raise BadRecord(Reason.TOO_LONG)
    return to_text(text)


def decode_base64(data: str) -> bytes:
    """Bytes of a base64 string, which may be broken into lines. Raises BadRecord."""
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError:
        pass
    raise BadRecord(Reason.BROKEN_BASE64)


def _div(resource: Resource) -> str:
    return string(child(resource, "text"), "div")


def _all_sections(resource: Resource) -> Iterator[Resource]:
    for section in items(resource.get("section")):
        yield section
        yield from _all_sections(section)


def _section_text(section: Resource) -> str:
    inner = [to_text(_div(section)), *map(_section_text, items(section.get("section")))]
    body = "\n".join(filter(None, inner))
    title = string(section, "title") or string(child(section, "code"), "text")
    return f"{title}\n{body}".strip() if body else ""


def _media_type(attachment: Resource) -> str:
    return string(attachment, "contentType").partition(";")[0].strip().lower()


def _charset(attachment: Resource) -> str:
    for parameter in string(attachment, "contentType").split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip().strip("\"'")
    return ""


def _rank(media_type: str) -> int:
    """0 for plain text (and where no type is given), 1 for markup, 2 for all that is not text."""
    return 0 if media_type in ("text/plain", "") else 1 if media_type in _MARKUP else 2


def _attached(attachment: Resource, fetch: Callable[[str], bytes]) -> bytes:
    if data := string(attachment, "data"):
        return decode_base64(data)
    if url := string(attachment, "url"):
        return fetch(url)
    raise BadRecord(Reason.ATTACHMENT)


def _decoded(raw: bytes, encoding: str) -> str:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode(encoding)
    except (UnicodeError, LookupError):  # LookupError: a charset that does not exist
        pass
    raise BadRecord(Reason.ENCODING)
