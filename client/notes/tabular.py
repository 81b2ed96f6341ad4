"""JSON lines, CSV and Parquet: one record a note, its fields named in the settings.

A record without one of the configured fields is rejected. Where no field for the note's id is
configured the id is ``file:line``, which stays the same while the file is only added to. In JSON a
dotted name reaches into nested objects.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from client.notes.clean import clean_id, clean_text
from client.notes.files import MAX_LINE, find_files, read_json_lines, read_lines, shown
from client.notes.note import BadRecord, Note, NotesError, Outcome, Reason, Rejected
from conf.schema import NotesSettings

Record = Mapping[str, object]

_ASCII = bytes(range(128))
_BATCH = 256  # Parquet rows in memory at a time
_UNDECODABLE = "\udcff"  # a lone surrogate: clean_text and clean_id reject it as wrong encoding


def read_jsonl(path: Path, settings: NotesSettings) -> Iterator[Outcome]:
    """One outcome for each line that is not blank; in a folder, of ``*.jsonl`` and ``*.ndjson``."""
    _require_line_encoding(settings)
    for file in find_files(path, (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")):
        for line, record in read_json_lines(file, settings.encoding):
            yield _outcome(record, shown(file.name), line, settings)


def read_csv(path: Path, settings: NotesSettings) -> Iterator[Outcome]:
    """One outcome for each row below a header line; in a folder, of ``*.csv`` and ``*.tsv``.

    The delimiter (comma, semicolon, tab or bar) is the one that splits the header into the
    configured fields. A row that breaks the quoting rules is rejected with all lines it took.
    Raises NotesError where the header lacks a field.
    """
    _require_line_encoding(settings)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # process-wide, only ever raised
    for file in find_files(path, (".csv", ".tsv", ".csv.gz", ".tsv.gz")):
        yield from _csv_rows(file, settings)


def read_parquet(path: Path, settings: NotesSettings) -> Iterator[Outcome]:
    """One outcome for each row; in a folder, of ``*.parquet``. Raises as ``read_csv`` does."""
    for file in find_files(path, (".parquet",)):
        yield from _parquet_rows(file, settings)


def _outcome(record: Record | Reason, file: str, line: int, settings: NotesSettings) -> Outcome:
    """The note in a record, or why it is none."""
    if isinstance(record, Reason):
        return Rejected(file, line, record)
    place = f"{file}:{line}"
    try:
        text = _field(record, settings.text_field)
        if text is None:
            raise BadRecord(Reason.FIELD_MISSING.of(settings.text_field))
        if not isinstance(text, str):
            raise BadRecord(Reason.FIELD_NOT_TEXT.of(settings.text_field))
        return Note(
            note_id=_id(record, settings.note_field) or place,
            patient_id=_id(record, settings.patient_field),
            text=clean_text(text, settings.min_chars, settings.max_chars),
            hospital=_id(record, settings.hospital_field),
            origin=place,
        )
    except BadRecord as bad:
        return Rejected(file, line, bad.reason)


def _field(record: Record, name: str) -> object:
    if name in record:
        return record[name]
    head, _, rest = name.partition(".")
    inner = record.get(head)
    return _field(inner, rest) if rest and isinstance(inner, dict) else None


def _id(record: Record, field: str | None) -> str | None:
    """The id or name under a configured field; None where no field is configured."""
    if not field:
        return None
    found = clean_id(_field(record, field), field)
    if found is None:
        raise BadRecord(Reason.FIELD_MISSING.of(field))
    return found


# --- CSV ---


def _csv_rows(file: Path, settings: NotesSettings) -> Iterator[Outcome]:
    name = shown(file.name)
    failed: dict[int, Reason] = {}
    lines = _decoded_lines(file, settings.encoding, failed)
    first = next(lines, None)
    if failed.get(1, Reason.ENCODING) is not Reason.ENCODING:
        yield Rejected(name, 1, failed[1])
    elif first is not None:
        header, delimiter = _header(first, settings)
        _require_fields(header, file, settings)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        end = 1
        while (row := _next_row(rows)) is not None:
            start, end = end + 1, rows.line_num + 1
            # A line that failed spoils the row it belongs to, whatever the row looks like now.
            reason = next((failed[n] for n in range(start, end + 1) if n in failed), None)
            if reason or row:
                yield _outcome(reason or _named(row, header), name, start, settings)


def _decoded_lines(file: Path, encoding: str, failed: dict[int, Reason]) -> Iterator[str]:
    """Lines for the CSV parser, with the bad ones noted in ``failed``.

    A line that cannot be decoded is passed on with its ASCII intact, so that quotes and delimiters
    still count and the rows around it are read.
    """
    for number, line in read_lines(file):
        if isinstance(line, Reason):
            failed[number] = line
            yield "\n"
            continue
        try:
            text = line.decode(encoding)
        except UnicodeError:
            failed[number] = Reason.ENCODING
            text = line.decode("ascii", "surrogateescape")
        yield text


def _header(line: str, settings: NotesSettings) -> tuple[list[str], str]:
    """Column names and the delimiter under which most configured fields are found."""
    splits = {}
    for delimiter in ",;\t|":
        row = _next_row(csv.reader([line], delimiter=delimiter, strict=True))
        splits[delimiter] = [name.strip() for name in row] if isinstance(row, list) else []
    wanted = set(_configured(settings).values())
    best = max(splits, key=lambda delimiter: len(wanted & set(splits[delimiter])))
    return splits[best], best


def _next_row(rows: Iterator[list[str]]) -> list[str] | Reason | None:
    try:
        return next(rows, None)
    except csv.Error:
        return Reason.BROKEN_CSV


def _named(row: list[str] | Reason, header: list[str]) -> Record | Reason:
    if isinstance(row, Reason):
        return row
    if len(row) != len(header):
        return Reason.WRONG_COLUMNS
    return dict(zip(header, row, strict=True))


# --- Parquet ---


def _parquet_rows(file: Path, settings: NotesSettings) -> Iterator[Outcome]:
    name, number = shown(file.name), 0
    table = _open_parquet(file)
    if table is None:
        yield Rejected(name, None, Reason.UNREADABLE)
        return
    with table:
        _require_fields(table.schema_arrow.names, file, settings)
        fields = sorted(set(_configured(settings).values()))
        batches = table.iter_batches(_BATCH, columns=fields)
        while (columns := _next_batch(batches, settings.encoding)) is not None:
            if isinstance(columns, Reason):  # nothing after this place can be read
                yield Rejected(name, number + 1, columns)
                return
            for values in zip(*columns, strict=True):
                number += 1
                yield _outcome(dict(zip(fields, values, strict=True)), name, number, settings)


def _open_parquet(file: Path) -> pq.ParquetFile | None:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError):
        return None


def _next_batch(
    batches: Iterator[pa.RecordBatch], encoding: str
) -> list[list[object]] | Reason | None:
    """The next rows by column, in the order asked for; None after the last."""
    try:
        batch = next(batches, None)
        if batch is None:
            return None
        by_name = sorted(zip(batch.schema.names, batch.columns, strict=True), key=lambda c: c[0])
        return [_values(column, encoding) for _, column in by_name]
    except (pa.ArrowException, OSError):
        return Reason.UNREADABLE


def _values(column: pa.Array, encoding: str) -> list[object]:
    """Python values. Strings are decoded here, one by one: Arrow would raise with the bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column, encoding = column.cast(pa.large_binary()), "utf-8"
    return [_decoded(v, encoding) if isinstance(v, bytes) else v for v in column.to_pylist()]


def _decoded(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeError:
        return _UNDECODABLE


# --- settings against files ---


def _configured(settings: NotesSettings) -> dict[str, str]:
    """Setting -> field, of the fields that are asked for."""
    asked = {
        "text_field": settings.text_field,
        "patient_field": settings.patient_field,
        "note_field": settings.note_field,
        "hospital_field": settings.hospital_field,
    }
    return {setting: field for setting, field in asked.items() if field}


def _require_fields(names: Collection[str], file: Path, settings: NotesSettings) -> None:
    """NotesError where a column is absent. The columns there are not listed: where a CSV file has
    no header line they are its first note."""
    for setting, field in _configured(settings).items():
        if field not in names:
            raise NotesError(f"{file}: no column {field!r}; set notes.{setting} to a column")


def _require_line_encoding(settings: NotesSettings) -> None:
    """Lines are found as bytes, so line ends, quotes and delimiters must be those of ASCII."""
    try:
        fits = _ASCII.decode(settings.encoding) == _ASCII.decode("ascii")
    except UnicodeError:
        fits = False
    if not fits:
        raise NotesError(
            f"notes.encoding={settings.encoding}: {settings.source} needs an encoding that extends "
            "ASCII; convert the file to utf-8"
        )
