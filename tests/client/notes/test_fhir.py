"""FHIR exports in the shapes that vendors write: files, references, attachments, narratives."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from client.notes.fhir_document import attachment_text, composition_text, reference_id, type_names
from client.notes.load import NotesError, load_notes
from client.notes.note import BadRecord, Reason
from conf.schema import NotesSettings

Json = dict[str, Any]
Make = Callable[..., Any]
Write = Callable[[Mapping[str, list[Json]]], Path]


def _attachment(text: str, kind: str = "text/plain", encoding: str = "utf-8") -> Json:
    data = base64.b64encode(text.encode(encoding)).decode()
    return {"attachment": {"contentType": kind, "data": data}}


def _encounter(name: str, **elements: Any) -> Json:
    return {"resourceType": "Encounter", "id": name} | elements


def test_both_kinds_of_document_in_a_fixed_order(
    export: Write, settings: Make, document: Make, composition: Make, section: Make
) -> None:
    folder = export(
        {
            "DocumentReference.ndjson": [document("d1"), document("d2", patient="p2")],
            "Composition.ndjson": [composition("c1", [section("Plan", "Rest at home.")])],
        }
    )
    found = load_notes(settings("fhir", folder))
    assert [(n.note_id, n.patient_id, n.origin) for n in found.notes] == [
        ("Composition/c1", "p1", "Composition.ndjson:1"),
        ("DocumentReference/d1", "p1", "DocumentReference.ndjson:1"),
        ("DocumentReference/d2", "p2", "DocumentReference.ndjson:2"),
    ]
    assert found.has_patients
    assert [len(notes) for notes in found.units().values()] == [2, 1]


@pytest.mark.parametrize(
    "name",
    ["DocumentReference-1.ndjson", "DocumentReference.000.ndjson", "2.DocumentReference.ndjson"],
)
def test_file_names(export: Write, settings: Make, document: Make, name: str) -> None:
    folder = export({name: [document("d1")], "DocumentReferenceLog.ndjson": [{"x": 1}]})
    assert len(load_notes(settings("fhir", folder)).notes) == 1
    (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    (folder / name).unlink()
    assert len(load_notes(settings("fhir", folder)).notes) == 1


def test_nested_sections_keep_their_titles(composition: Make, section: Make) -> None:
    inner = section("Heart", "S1, S2 &amp; no murmur")
    sections = [
        section("Examination", "", section("Empty", " "), inner),
        section("Allergies", ""),
        {"code": {"text": "Plan"}, "text": {"div": "<div><p>Rest.</p><p>Fluids.</p></div>"}},
    ]
    text = composition_text(composition("c1", sections), 1000)
    assert text == (
        "Discharge summary\n\nExamination\nHeart\nS1, S2 & no murmur\n\nPlan\nRest.\n\nFluids."
    )


def test_a_composition_without_sections_falls_back_to_its_narrative(composition: Make) -> None:
    narrative = {"text": {"div": "<div>Came in with fever.</div>"}}
    assert composition_text(composition("c1", [], **narrative), 99).endswith("Came in with fever.")
    assert composition_text(composition("c1", []), 99) == ""


def test_the_plainest_attachment_is_read(document: Make) -> None:
    def read(*content: Json) -> str | None:
        return attachment_text(document("d", content=list(content)), bytes, "utf-8", 1000)

    pdf, plain = _attachment("%PDF", "application/pdf"), _attachment("plain note")
    markup = _attachment("<html><body><p>marked</p> note</body></html>", "text/html; charset=UTF-8")
    assert read(pdf, markup, plain) == "plain note"
    assert read(pdf, markup) == "marked\nnote"
    assert read(pdf) is None
    assert read() is None
    latin = _attachment("Größe 180", 'text/plain; charset="iso-8859-1"', "iso-8859-1")
    assert read(latin) == "Größe 180"
    assert read({"attachment": {"data": plain["attachment"]["data"]}}) == "plain note"


@pytest.mark.parametrize(
    ("attachment", "reason"),
    [
        ({"data": "not base64!"}, Reason.BROKEN_BASE64),
        ({"data": "größe"}, Reason.BROKEN_BASE64),
        ({"data": base64.b64encode(b"caf\xe9 au lait").decode()}, Reason.ENCODING),
        ({"contentType": "text/plain; charset=nonesuch", "data": "YWJj"}, Reason.ENCODING),
        ({"title": "nothing in it"}, Reason.ATTACHMENT),
        ({"url": "../secret.txt"}, Reason.ATTACHMENT),
        ({"url": "link.txt"}, Reason.ATTACHMENT),
        ({"url": "https://server/fhir/Binary/b9"}, Reason.ATTACHMENT),
        ({"url": "a\x00b"}, Reason.ATTACHMENT),
        (_attachment("<p>" * 5000, "text/html")["attachment"], Reason.TOO_LONG),
        (_attachment("<p> </p>", "text/html")["attachment"], Reason.EMPTY),
    ],
)
def test_attachments_that_cannot_be_read(
    export: Write, settings: Make, document: Make, attachment: Json, reason: Reason
) -> None:
    content = [{"attachment": attachment}]
    folder = export({"DocumentReference.ndjson": [document("d1", content=content), document("d2")]})
    (folder.parent / "secret.txt").write_text("outside the export")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    found = load_notes(settings("fhir", folder))
    assert [(r.line, r.reason) for r in found.rejected] == [(1, reason)]
    assert len(found.notes) == 1


def test_attachments_by_url(export: Write, settings: Make, document: Make) -> None:
    def linked(name: str, url: str) -> Json:
        return document(name, content=[{"attachment": {"contentType": "text/plain", "url": url}}])

    data = base64.encodebytes(b"kept as a Binary").decode()  # broken into lines
    folder = export(
        {
            "DocumentReference.ndjson": [
                linked("d1", "notes/day%201.txt"),
                linked("d2", "https://server/fhir/Binary/b1"),
            ],
            "Binary.ndjson": [{"resourceType": "Binary", "id": "b1", "data": data}],
        }
    )
    (folder / "notes").mkdir()
    (folder / "notes" / "day 1.txt").write_text("kept as a file")
    found = load_notes(settings("fhir", folder))
    assert [n.text for n in found.notes] == ["kept as a file", "kept as a Binary"]


def test_documents_left_out_are_counted_but_not_bad(
    export: Write, settings: Make, document: Make, composition: Make, section: Make
) -> None:
    folder = export(
        {
            "DocumentReference.ndjson": [
                document("d1", status="entered-in-error"),
                document("d2", docStatus="entered-in-error"),
                document("d3", status="superseded"),
                document("d4", type={"text": "Nurse Note"}),
                document("d5", content=[_attachment("%PDF", "application/pdf")]),
                document("d6"),
            ],
            "Composition.ndjson": [composition("c1", [section("Plan", "Rest at home.")])],
        }
    )
    wanted = ("11506-3", "discharge SUMMARY note")
    chosen = settings("fhir", folder, document_types=wanted, on_bad_record="refuse")
    found = load_notes(chosen)
    assert [n.note_id for n in found.notes] == ["Composition/c1", "DocumentReference/d6"]
    assert found.counts() == {Reason.WITHDRAWN: 3, Reason.OTHER_TYPE: 1, Reason.NO_TEXT: 1}
    assert found.records == 7


def test_type_names_are_codes_displays_and_titles() -> None:
    kind = {"coding": [{"code": "34117-2", "display": "H&P"}, "rubbish"], "text": "Admission"}
    assert type_names({"type": kind, "title": "Note"}) == {"34117-2", "h&p", "admission", "note"}


def test_hospital_from_the_encounter(export: Write, settings: Make, document: Make) -> None:
    contained = {"resourceType": "Encounter", "id": "in", "serviceType": {"text": "Surgery"}}
    folder = export(
        {
            "DocumentReference.ndjson": [
                document("d1"),
                document(
                    "d2",
                    context={"encounter": [{"reference": "https://s/Encounter/e2/_history/3"}]},
                ),
                document(
                    "d3", context={"encounter": [{"reference": "#in"}]}, contained=[contained]
                ),
                document("d4", context={"encounter": [{"reference": "Encounter/unknown"}]}),
            ],
            "Encounter.ndjson": [
                _encounter("e1", serviceType={"text": "Cardiology"}),
                _encounter(
                    "e2",
                    serviceType={"coding": [{"display": "Oncology"}]},
                    serviceProvider={"reference": "Organization/north"},
                ),
            ],
        }
    )
    found = load_notes(settings("fhir", folder, hospital_field="department"))
    assert [n.hospital for n in found.notes] == ["Cardiology", "Oncology", "Surgery"]
    assert [(r.line, r.reason) for r in found.rejected] == [(4, "field missing: department")]
    found = load_notes(settings("fhir", folder, hospital_field="serviceProvider"))
    assert [n.hospital for n in found.notes] == ["north"]


def test_an_export_without_encounters_or_patients(
    export: Write, settings: Make, document: Make
) -> None:
    folder = export({"DocumentReference.ndjson": [document("d1")]})
    assert load_notes(settings("fhir", folder)).notes[0].hospital is None


def test_linked_patients_are_one_person(export: Write, settings: Make, document: Make) -> None:
    def patient(name: str, *others: str) -> Json:
        link = [{"other": {"reference": f"Patient/{o}"}, "type": "seealso"} for o in others]
        return {"resourceType": "Patient", "id": name, "link": link}

    names = ["p5", "p4", "p3", "p2", "p1"]
    folder = export(
        {
            "DocumentReference.ndjson": [document(f"d{n}", patient=n) for n in names],
            "Patient.ndjson": [patient("p2", "p3"), patient("p5", "p4"), patient("p3", "p4")],
        }
    )
    units = load_notes(settings("fhir", folder)).units()
    assert {unit: len(notes) for unit, notes in units.items()} == {"p2": 4, "p1": 1}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_patient_exported_twice_keeps_every_link(
    export: Write, settings: Make, document: Make, order: tuple[int, int]
) -> None:
    """Versions of one patient, or chunks of an export: the last need not repeat the link."""
    versions = [
        {"resourceType": "Patient", "id": "p2", "link": [{"other": {"reference": "Patient/p1"}}]},
        {"resourceType": "Patient", "id": "p2"},
    ]
    folder = export(
        {
            "DocumentReference.ndjson": [document(n, patient=n) for n in ("p1", "p2")],
            "Patient.ndjson": [versions[i] for i in order],
        }
    )
    assert set(load_notes(settings("fhir", folder)).units()) == {"p1"}


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"subject": {"reference": "Group/g1"}}, "field missing: subject.reference"),
        ({"subject": {"reference": "#contained"}}, "field missing: subject.reference"),
        ({"subject": ["Patient/p1"]}, "field missing: subject.reference"),
        ({"id": None}, "field missing: id"),
        ({"id": {"value": "d1"}}, "field not text: id"),
        ({"resourceType": "Observation"}, "wrong resource type"),
    ],
)
def test_documents_that_cannot_be_attributed(
    export: Write, settings: Make, document: Make, elements: Json, reason: str
) -> None:
    folder = export({"DocumentReference.ndjson": [document("d1") | elements, document("d2")]})
    found = load_notes(settings("fhir", folder))
    assert [(r.line, r.reason) for r in found.rejected] == [(1, reason)]


def test_broken_lines_of_referred_resources_are_reported(
    export: Write, settings: Make, document: Make
) -> None:
    folder = export({"DocumentReference.ndjson": [document("d1")]})
    (folder / "Patient.ndjson").write_text('{"resourceType": "Patient", "id": "p1"}\n{"id"\n')
    found = load_notes(settings("fhir", folder))
    assert [(str(r), r.reason) for r in found.rejected] == [
        ("Patient.ndjson:2", Reason.BROKEN_JSON)
    ]


def test_a_folder_without_documents(export: Write, settings: Make) -> None:
    folder = export({"Patient.ndjson": []})
    with pytest.raises(NotesError, match="no DocumentReference"):
        load_notes(settings("fhir", folder))


KEYS = st.sampled_from(
    [
        *("type", "coding", "code", "display", "text", "title", "section", "div"),
        *("content", "attachment", "contentType", "data", "url"),
    ]
)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("aé<&>/=", max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=10,
)
REFUSALS = {Reason.TOO_LONG, Reason.BROKEN_BASE64, Reason.ENCODING, Reason.ATTACHMENT}


@pytest.mark.parametrize("depth", [100, 400, 3000])
def test_sections_may_be_nested_deeply(
    export: Write, settings: Make, document: Make, depth: int
) -> None:
    folder = export({"DocumentReference.ndjson": [document("d1")]})
    section = '{"text": {"div": "<p>word</p>"}, "section": ['
    (folder / "Composition.ndjson").write_text(
        '{"resourceType": "Composition", "id": "c1", "subject": {"reference": "Patient/p1"}, '
        f'"section": [{section * depth}{"]}" * depth}]}}\n'
    )
    found = load_notes(settings("fhir", folder, max_chars=10_000))
    assert found.records == 2
    assert [r.reason for r in found.rejected] == [Reason.BROKEN_JSON] * (depth == 3000)
    assert found.notes[0].text.count("word") == depth or depth == 3000


@hypothesis_settings(deadline=None)
@given(st.dictionaries(KEYS, JSON_VALUE))
def test_any_json_in_a_document_is_text_or_a_bad_record(resource: Json) -> None:
    refusals = set()
    for read in (
        lambda: composition_text(resource, 50),
        lambda: attachment_text(resource, lambda url: b"fetched", "utf-8", 50),
    ):
        try:
            assert isinstance(read(), str | None)
        except BadRecord as bad:
            refusals.add(bad.reason)
    assert refusals <= REFUSALS
    assert all(isinstance(name, str) for name in type_names(resource))


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("Patient/p1", "p1"),
        ("https://host/fhir/Patient/p1/_history/2", "p1"),
        ("urn:uuid:1b4e-28ba", "1b4e-28ba"),
        ("Group/p1", None),
        ("#p1", None),
        ("", None),
        ("Patient/", None),
        (None, None),
        (3, None),
    ],
)
def test_references(reference: object, found: str | None) -> None:
    assert reference_id(reference, "Patient") == found


def test_settings_with_a_field_fhir_does_not_have(
    export: Write, settings: Callable[..., NotesSettings], document: Make
) -> None:
    folder = export({"DocumentReference.ndjson": [document("d1")]})
    with pytest.raises(NotesError, match=r"notes\.hospital_field=ward: .* allows null, department"):
        load_notes(settings("fhir", folder, hospital_field="ward"))
