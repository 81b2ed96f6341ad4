"""A folder of text files: folders name hospital and patient, a bad file spoils no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from client.notes.load import NotesError, load_notes
from client.notes.note import Reason
from conf.schema import NotesSettings

Make = Callable[..., NotesSettings]


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [(None, None), (None, None), (None, None)]),
        ({"patient_field": "folder"}, [("north", None), ("north", None), ("south", None)]),
        ({"hospital_field": "folder"}, [(None, "north"), (None, "north"), (None, "south")]),
        (
            {"hospital_field": "folder", "patient_field": "folder"},
            [("p1", "north"), ("p1", "north"), ("p2", "south")],
        ),
    ],
)
def test_folders_name_hospital_and_patient(
    tmp_path: Path,
    settings: Make,
    fields: dict[str, str],
    expected: list[tuple[str | None, str | None]],
) -> None:
    names = ["north/p1/2024/a.txt", "north/p1/b.TXT", "south/p2/a.txt"]
    _write(tmp_path, dict.fromkeys([*names, "north/p1/scan.pdf"], b"Seen today."))
    found = load_notes(settings("text", tmp_path, **fields))
    assert [n.note_id for n in found.notes] == names
    assert [(n.patient_id, n.hospital) for n in found.notes] == expected
    assert found.has_patients == ("patient_field" in fields)


def test_bad_files(tmp_path: Path, settings: Make) -> None:
    _write(
        tmp_path,
        {
            "a.txt": b"no folder around it",
            "p/b.txt": b"caf\xe9 au lait",
            "p/c.txt": b"",
            "p/d.txt": b"x" * 5_000_000,
            "p/e.txt": b"\xef\xbb\xbfwith a mark",
        },
    )
    found = load_notes(settings("text", tmp_path, patient_field="folder"))
    assert [n.text for n in found.notes] == ["with a mark"]
    assert [(r.file, r.line, r.reason) for r in found.rejected] == [
        ("a.txt", None, "field missing: folder for patient_field"),
        ("p/b.txt", None, Reason.ENCODING),
        ("p/c.txt", None, Reason.EMPTY),
        ("p/d.txt", None, Reason.TOO_LONG),
    ]
    assert found.records == 5


def test_whole_files_may_have_any_encoding(tmp_path: Path, settings: Make) -> None:
    _write(tmp_path, {"a.txt": "Fieber über 38 °C".encode("utf-16")})
    found = load_notes(settings("text", tmp_path, encoding="utf-16"))
    assert found.notes[0].text == "Fieber über 38 °C"


def test_a_folder_without_text_and_a_file_instead_of_one(tmp_path: Path, settings: Make) -> None:
    with pytest.raises(NotesError, match=r"no \*\.txt"):
        load_notes(settings("text", tmp_path))
    _write(tmp_path, {"a.txt": b"Seen today."})
    with pytest.raises(NotesError, match="not a folder"):
        load_notes(settings("text", tmp_path / "a.txt"))
