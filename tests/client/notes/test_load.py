"""What stops reading, in one line; and that no text of a note is ever shown."""

from __future__ import annotations

import base64
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client.notes.load import NotesError, load_notes
from client.notes.note import Note, NoteSet
from conf.schema import NotesSettings

Make = Callable[..., NotesSettings]
CANARY = "Zebedee Quill drank lighter fluid"


def _jsonl(folder: Path, *lines: str) -> Path:
    file = folder / "notes.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_refusing_names_the_first_place_and_the_counts(tmp_path: Path, settings: Make) -> None:
    file = _jsonl(tmp_path, '{"text": "a good note"}', "{", '{"text": ""}', "}")
    with pytest.raises(NotesError) as caught:
        load_notes(settings("jsonl", file, on_bad_record="refuse"))
    message = str(caught.value)
    assert "notes.jsonl:2: broken JSON" in message
    assert "3 of 4 records rejected (2 broken JSON, 1 empty note)" in message
    assert "notes.on_bad_record=skip" in message


def test_no_usable_note_says_why(tmp_path: Path, settings: Make) -> None:
    file = _jsonl(tmp_path, '{"body": "a good note"}')
    with pytest.raises(
        NotesError, match=r"no usable note among 1 records \(1 field missing: text\)"
    ):
        load_notes(settings("jsonl", file))
    with pytest.raises(NotesError, match="no usable note among 0 records"):
        load_notes(settings("jsonl", _jsonl(tmp_path)))


@pytest.mark.parametrize(
    ("source", "name", "others", "message"),
    [
        ("jsonl", "absent.jsonl", {}, "no such file or folder"),
        ("jsonl", ".", {}, r"no file named \*\.jsonl or"),
        ("jsonl", "notes.jsonl", {"encoding": "klingon"}, "notes.encoding=klingon"),
        ("jsonl", "notes.jsonl", {"encoding": "rot13"}, "no such encoding"),
        ("jsonl", "notes.jsonl", {"document_types": ("1",)}, "only notes=fhir"),
        ("fhir", "notes.jsonl", {}, "not a folder"),
        ("text", ".", {"note_field": "id"}, r"notes\.note_field=id: notes=text allows null"),
        ("clinosim", "notes.jsonl", {}, "made by `wardround simulate`"),
    ],
)
def test_what_stops_is_one_line_with_a_way_out(
    tmp_path: Path,
    settings: Make,
    source: str,
    name: str,
    others: dict[str, object],
    message: str,
) -> None:
    _jsonl(tmp_path, '{"text": "a good note"}')
    if name == ".":
        (tmp_path / "notes.jsonl").unlink()
    with pytest.raises(NotesError, match=message) as caught:
        load_notes(settings(source, tmp_path / name, **others))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_what_was_rejected_is_logged_by_place(
    tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    file = _jsonl(tmp_path, '{"text": "a good note"}', *["{"] * 5)
    load_notes(settings("jsonl", file))
    places = "notes.jsonl:2, notes.jsonl:3, notes.jsonl:4, ..."
    assert caplog.messages == [f"notes rejected: 5 x broken JSON: {places}"]


def _bad_inputs(folder: Path) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Sources in which every record is broken in one way and holds the canary."""
    lines = folder / "lines.jsonl"
    latin = f'{{"text": "{CANARY} \xe9"}}'.encode("latin-1")
    texts = [CANARY * 100, f"{CANARY} \ud800"]
    records = [{"text": t} for t in texts] + [
        {"text": [CANARY]},
        {"text": {CANARY: 1}},
        {CANARY: 1},
    ]
    rows = [json.dumps(r).encode() for r in records]
    lines.write_bytes(b"\n".join([f'{{"text": "{CANARY}'.encode(), latin, CANARY.encode(), *rows]))
    yield "jsonl", lines, {}
    yield "jsonl", lines, {"patient_field": "text"}
    yield "jsonl", lines, {"note_field": "text", "encoding": "ascii"}

    table = folder / "table.csv"
    table.write_bytes(b'text,n\n"' + CANARY.encode() + b'" x,1\n\xe9' + CANARY.encode() + b",2\n")
    yield "csv", table, {}
    bare = folder / "bare.csv"
    bare.write_text(f"{CANARY}\n{CANARY}\n")
    yield "csv", bare, {}

    column = folder / "column.parquet"
    raw = pa.array([CANARY.encode() + b"\xe9"])
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, raw.buffers())}), column)
    yield "parquet", column, {}
    broken = folder / "broken.parquet"
    broken.write_bytes(b"PAR1" + CANARY.encode() + b"PAR1")
    yield "parquet", broken, {}

    texts_folder = folder / "texts"
    texts_folder.mkdir()
    (texts_folder / "a.txt").write_bytes(CANARY.encode() + b"\xe9")
    yield "text", texts_folder, {}

    export = folder / "export"
    export.mkdir()
    subject = {
        "subject": {"reference": "Patient/p1"},
        "resourceType": "DocumentReference",
        "id": "d",
    }
    data = base64.b64encode(CANARY.encode() + b"\xe9").decode()
    attachments = [{"data": data}, {"data": CANARY}, {"url": CANARY}, {"contentType": CANARY}]
    documents = [subject | {"content": [{"attachment": a}]} for a in attachments]
    documents += [{"resourceType": CANARY}, subject | {"subject": {"reference": CANARY * 20}}]
    (export / "DocumentReference.ndjson").write_text("\n".join(map(json.dumps, documents)))
    yield "fhir", export, {}


def _shown(error: BaseException) -> str:
    """Everything that the exception and those it came from could bring to light."""
    parts, link = ["".join(traceback.format_exception(error))], error
    chain = [error]
    while (link := link.__cause__ or link.__context__) is not None:  # type: ignore[assignment]
        chain.append(link)
    parts += [
        repr((e, e.args, vars(e), getattr(e, "object", ""), getattr(e, "doc", ""))) for e in chain
    ]
    return "".join(parts)


@pytest.mark.parametrize("policy", ["skip", "refuse"])
def test_no_text_of_a_bad_record_is_ever_shown(
    tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    caplog.set_level(logging.DEBUG)
    tried = 0
    for source, path, others in _bad_inputs(tmp_path):
        with pytest.raises(NotesError) as caught:
            load_notes(settings(source, path, on_bad_record=policy, **others))
        assert "Zebedee" not in _shown(caught.value), source
        tried += 1
    assert tried == 9
    assert "Zebedee" not in caplog.text


def test_no_text_of_good_and_bad_records_together_is_ever_shown(
    tmp_path: Path, settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good = json.dumps({"text": CANARY, "id": f"id of {CANARY}"})
    file = _jsonl(tmp_path, good, good, f'{{"text": "{CANARY}')
    found = load_notes(settings("jsonl", file, note_field="id", patient_field="id"))
    assert found.notes[0].text == CANARY
    assert found.records == 3
    views = [repr(found), str(found), repr(found.notes), repr(found.rejected), *found.problems()]
    assert "Zebedee" not in "".join([*views, caplog.text])


def test_units_are_contents_where_there_are_no_patients() -> None:
    """Wherever a note stands in a file, it is the same unit: others coming or going move nobody."""
    texts = ("Seen in clinic.", "Seen at home.", "Seen in clinic.")
    notes = tuple(Note(f"n{i}", None, text, None, f"f:{i}") for i, text in enumerate(texts))
    found = NoteSet(notes, (), has_patients=False).units()
    assert list(found.values()) == [(notes[0], notes[2]), (notes[1],)]
    moved = NoteSet(
        tuple(Note(f"m{i}", None, n.text, None, "g") for i, n in enumerate(notes[1:])), (), False
    )
    assert set(moved.units()) == set(found)
