"""JSON lines, CSV and Parquet: what is good is read in order, what is bad is named by its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from client.notes import files
from client.notes.load import NotesError, load_notes
from client.notes.note import NoteSet, Reason
from conf.schema import NotesSettings

Make = Callable[..., NotesSettings]
SHARED_FOLDER = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BAD_LINES = {
    b'{"text": "cut off': Reason.BROKEN_JSON,
    b"[1, 2, 3]": Reason.NOT_AN_OBJECT,
    b"[" * 5000: Reason.BROKEN_JSON,  # deeper than the parser goes
    b'{"id": 1}': Reason.FIELD_MISSING.of("text"),
    b'{"text": null}': Reason.FIELD_MISSING.of("text"),
    b'{"text": 7}': Reason.FIELD_NOT_TEXT.of("text"),
    b'{"text": " \\u0000 "}': Reason.EMPTY,
    b'{"text": "tiny"}': Reason.TOO_SHORT,
    b'{"text": "' + b"x" * 5_000_000 + b'"}': Reason.TOO_LONG,
    b'{"text": "caf\xe9 au lait"}': Reason.ENCODING,
    b'{"text": "lone \\ud800 surrogate"}': Reason.ENCODING,
}


def _rejected(found: NoteSet) -> list[tuple[str, int | None, str]]:
    return [(r.file, r.line, r.reason) for r in found.rejected]


@SHARED_FOLDER
@given(
    st.lists(st.one_of(st.just(None), st.sampled_from(list(BAD_LINES)), st.just(b"  ")), max_size=8)
)
def test_any_mixture_of_lines_is_accounted_for(
    tmp_path: Path, settings: Make, kinds: list[bytes | None]
) -> None:
    """None stands for a good line; blank lines are no records."""
    lines = [b'{"text": "note %d is good"}' % n if k is None else k for n, k in enumerate(kinds)]
    file = tmp_path / "notes.jsonl"
    file.write_bytes(b"\n".join([*lines, b'{"text": "the last one"}']))
    found = load_notes(settings("jsonl", file))

    good = [f"note {n} is good" for n, k in enumerate(kinds) if k is None]
    assert [note.text for note in found.notes] == [*good, "the last one"]
    bad = [("notes.jsonl", n + 1, BAD_LINES[k]) for n, k in enumerate(kinds) if k in BAD_LINES]
    assert _rejected(found) == bad
    assert found.records == sum(bool(line.strip()) for line in lines) + 1


def test_jsonl_fields_nesting_and_defaults(tmp_path: Path, settings: Make) -> None:
    file = tmp_path / "notes.jsonl"
    rows = [
        {"note": {"body": "First visit."}, "who": {"mrn": 12}, "ward": "A"},
        {"note.body": "Second visit.", "who": {"mrn": "12 "}, "ward": "B"},
        {"note": {"body": "No patient."}, "ward": "B"},
        {"note": {"body": "No ward here."}, "who": {"mrn": 3}, "ward": ""},
    ]
    file.write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    fields = {"text_field": "note.body", "patient_field": "who.mrn", "hospital_field": "ward"}
    found = load_notes(settings("jsonl", file, **fields))
    assert [(n.patient_id, n.hospital, n.note_id) for n in found.notes] == [
        ("12", "A", "notes.jsonl:1"),
        ("12", "B", "notes.jsonl:2"),
    ]
    assert list(found.units()) == ["12"]
    assert _rejected(found) == [
        ("notes.jsonl", 3, "field missing: who.mrn"),
        ("notes.jsonl", 4, "field missing: ward"),
    ]


def test_copies_are_rejected_and_so_is_an_id_that_stands_for_different_notes(
    tmp_path: Path, settings: Make
) -> None:
    for name, ids in {"a.jsonl": ["x", "y", "x"], "b.jsonl": ["y", "z"]}.items():
        rows = [json.dumps({"id": i, "text": f"{name} {i} seen"}) for i in ids]
        (tmp_path / name).write_text("\n".join(rows))
    found = load_notes(settings("jsonl", tmp_path, note_field="id"))
    assert [n.text for n in found.notes] == ["a.jsonl x seen", "b.jsonl z seen"]
    assert _rejected(found) == [
        ("a.jsonl", 2, Reason.DUPLICATE),
        ("a.jsonl", 3, Reason.DUPLICATE),
        ("b.jsonl", 1, Reason.DUPLICATE),
    ]


def test_one_note_more_changes_at_most_one_other(tmp_path: Path, settings: Make) -> None:
    """Whatever id it comes under: with the first to come kept, one would go and another come."""
    rows = [{"id": i % 3, "text": f"note {i % 4} of the ward"} for i in range(6)]
    file = tmp_path / "notes.jsonl"

    def kept(some: list[dict[str, object]]) -> set[tuple[str, str]]:
        file.write_text("\n".join(map(json.dumps, some)))
        found = load_notes(settings("jsonl", file, note_field="id"))
        return {(n.note_id, n.text) for n in found.notes}

    known = [{"id": 9, "text": "a note that is always there"}]
    for size in range(6):
        for place in range(size + 1):
            base = rows[:size]
            more = [*base[:place], rows[5], *base[place:]]
            assert len(kept(known + base) ^ kept(known + more)) <= 1


def test_gzip_and_its_truncation(tmp_path: Path, settings: Make) -> None:
    file = tmp_path / "notes.jsonl.gz"
    whole = gzip.compress(b'{"text": "a good note"}\n' * 3)
    file.write_bytes(whole)
    assert len(load_notes(settings("jsonl", file)).notes) == 3
    file.write_bytes(whole[:-6])
    found = load_notes(settings("jsonl", file))
    assert len(found.notes) == 3
    assert _rejected(found) == [("notes.jsonl.gz", 4, Reason.UNREADABLE)]


def test_a_line_without_end_is_passed_over(
    tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_LINE", 64)
    file = tmp_path / "notes.jsonl"
    file.write_text('{"text": "' + "x" * 300 + '"}\n{"text": "a good note"}\n')
    found = load_notes(settings("jsonl", file))
    assert [n.origin for n in found.notes] == ["notes.jsonl:2"]
    assert _rejected(found) == [("notes.jsonl", 1, Reason.TOO_LONG)]


CELL = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\"',;"))


@SHARED_FOLDER
@given(st.lists(CELL, min_size=1, max_size=6), st.sampled_from(",;\t|"), st.booleans())
def test_csv_written_by_the_standard_library_comes_back(
    tmp_path: Path, settings: Make, bodies: list[str], delimiter: str, zipped: bool
) -> None:
    texts = [f"Note {body} ends." for body in bodies]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([("mrn", "text", "n"), *((n % 2, text, n) for n, text in enumerate(texts))])
    raw = b"\xef\xbb\xbf" + buffer.getvalue().encode()
    file = tmp_path / ("notes.csv.gz" if zipped else "notes.csv")
    file.write_bytes(gzip.compress(raw) if zipped else raw)
    json_file = tmp_path / "notes.jsonl"
    json_file.write_text("\n".join(json.dumps({"text": text}) for text in texts))

    found = load_notes(settings("csv", file, patient_field="mrn", note_field="n"))
    expected = load_notes(settings("jsonl", json_file))
    assert [n.text for n in found.notes] == [n.text for n in expected.notes]
    assert [n.note_id for n in found.notes] == [str(n) for n in range(len(texts))]
    assert len(found.units()) == min(2, len(texts))


def test_csv_bad_rows_are_named_by_the_line_they_start_on(tmp_path: Path, settings: Make) -> None:
    file = tmp_path / "notes.csv"
    file.write_bytes(
        b"mrn,text\n"
        b'1,"two\nlines here"\n'  # 2-3
        b"2,unquoted, so three cells\n"  # 4
        b'3,"closed" too early\n'  # 5
        b'4,"caf\xe9, in\nLatin-1"\n'  # 6-7
        b"\n"
        b",no patient here\n"  # 9
        b"5,the good one\n"  # 10
        b'6,"never closed\n7,swallowed by it\n'  # 11-12
    )
    found = load_notes(settings("csv", file, patient_field="mrn"))
    assert [(n.text, n.origin) for n in found.notes] == [
        ("two\nlines here", "notes.csv:2"),
        ("the good one", "notes.csv:10"),
    ]
    assert [(r.line, r.reason) for r in found.rejected] == [
        (4, Reason.WRONG_COLUMNS),
        (5, Reason.BROKEN_CSV),
        (6, Reason.ENCODING),
        (9, Reason.FIELD_MISSING.of("mrn")),
        (11, Reason.BROKEN_CSV),
    ]


def test_csv_in_another_encoding(tmp_path: Path, settings: Make) -> None:
    file = tmp_path / "notes.csv"
    file.write_bytes("größe;text\n1;Fieber über 38 °C\n".encode("cp1252"))
    found = load_notes(settings("csv", file, encoding="cp1252"))
    assert found.notes[0].text == "Fieber über 38 °C"


def test_a_five_megabyte_cell_is_too_long_not_broken(tmp_path: Path, settings: Make) -> None:
    file = tmp_path / "notes.csv"
    file.write_text('text\n"' + "word\n" * 1_000_000 + '"\na good note\n')
    found = load_notes(settings("csv", file))
    assert _rejected(found) == [("notes.csv", 2, Reason.TOO_LONG)]
    assert [n.text for n in found.notes] == ["a good note"]


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_an_absent_column_stops_without_naming_the_others(
    tmp_path: Path, settings: Make, source: str
) -> None:
    file = tmp_path / f"notes.{source}"
    if source == "csv":
        file.write_text("Mrs Smith fell at home,1\nSeen again,2\n")
    else:
        pq.write_table(pa.table({"Mrs Smith fell at home": ["1"]}), file)
    with pytest.raises(NotesError, match=r"no column 'text'; set notes\.text_field") as caught:
        load_notes(settings(source, file))
    assert "Smith" not in str(caught.value)


def test_parquet_types_and_bad_rows(tmp_path: Path, settings: Make) -> None:
    raw = [b"A good note.", b"caf\xe9 au lait", None, b"Another one."]
    text = pa.Array.from_buffers(pa.string(), 4, pa.array(raw, pa.binary()).buffers())
    table = pa.table(
        {
            "unused": [object.__name__] * 4,
            "text": text,  # holds invalid UTF-8, as some writers let through
            "mrn": pa.array([1.0, 2.0, 3.0, None]),
            "ward": pa.array(["A", "A", "B", "B"]).dictionary_encode(),
        }
    )
    file = tmp_path / "notes.parquet"
    pq.write_table(table, file, row_group_size=2)
    found = load_notes(settings("parquet", file, patient_field="mrn", hospital_field="ward"))
    assert [(n.text, n.patient_id, n.hospital) for n in found.notes] == [("A good note.", "1", "A")]
    assert [(r.line, r.reason) for r in found.rejected] == [
        (2, Reason.ENCODING),
        (3, Reason.FIELD_MISSING.of("text")),
        (4, Reason.FIELD_MISSING.of("mrn")),
    ]


def test_parquet_binary_text_has_the_configured_encoding(tmp_path: Path, settings: Make) -> None:
    file = tmp_path / "notes.parquet"
    pq.write_table(pa.table({"text": pa.array(["Fieber über 38".encode("utf-16")])}), file)
    found = load_notes(settings("parquet", file, encoding="utf-16"))
    assert found.notes[0].text == "Fieber über 38"


def test_parquet_damage_is_reported_not_raised(tmp_path: Path, settings: Make) -> None:
    texts = [f"note {n} " + "word " * 50 for n in range(600)]
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "b.parquet", row_group_size=300, compression="gzip"
    )
    whole = (tmp_path / "b.parquet").read_bytes()
    start = pq.ParquetFile(tmp_path / "b.parquet").metadata.row_group(1).column(0).data_page_offset
    (tmp_path / "b.parquet").write_bytes(whole[:start] + b"\xff" * 60 + whole[start + 60 :])
    (tmp_path / "a.parquet").write_bytes(b"not Parquet at all")
    found = load_notes(settings("parquet", tmp_path))
    assert ("a.parquet", None, Reason.UNREADABLE) in _rejected(found)
    last = found.rejected[-1]
    assert (last.file, last.reason) == ("b.parquet", Reason.UNREADABLE)
    assert last.line == len(found.notes) + 1 < 600


@pytest.mark.parametrize("encoding", ["utf-16", "utf-7", "cp037"])
def test_lines_need_an_encoding_that_extends_ascii(
    tmp_path: Path, settings: Make, encoding: str
) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text('{"text": "a good note"}')
    with pytest.raises(NotesError, match="convert the file to utf-8"):
        load_notes(settings("jsonl", file, encoding=encoding))
