"""Before a daemon connects: what would have each round refused is one line naming the policy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.preflight import preflight
from client.privacy.accountant import GaussianSteps
from client.privacy.ledger import Ledger
from client.privacy.unprotected import mark_unprotected, unprotected_mark
from client.site import SiteError, read_policy

Write = Callable[..., Path]
PRIVACY = {"epsilon": 8.0, "delta": 1e-5}


@pytest.fixture
def write(tmp_path: Path, tiny_model: Path) -> Write:
    """Write the policy of a site that is ready, with changes."""
    notes = tmp_path / "notes.jsonl"
    visits = (("p1", 1), ("p1", 2), ("p2", 3))
    lines = [{"text": f"Visit {n}: aspirin 100 mg for pain.", "pid": pid} for pid, n in visits]
    notes.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"pid": "p3"}]))

    def make(**changes: Any) -> Path:
        policy = {
            "site": "st-marys",
            "lineage": "discharge-notes",
            "ledger": str(tmp_path / "later" / "ledger.sqlite"),
            "notes": {"source": "jsonl", "path": str(notes), "patient_field": "pid"},
            "model": {"source": "path", "path": str(tiny_model)},
            "privacy": PRIVACY,
        }
        file = tmp_path / "site.yaml"
        file.write_text(yaml.safe_dump(policy | changes))
        return file

    return make


def complaint(file: Path) -> str:
    with pytest.raises(SiteError) as error:
        preflight(file)
    line = str(error.value)
    assert line.startswith(f"{file}: ")
    assert "\n" not in line
    return line.removeprefix(f"{file}: ")


def test_a_site_that_is_ready_is_told_its_notes_and_no_ledger_is_begun(write: Write) -> None:
    policy, notes = preflight(write())
    assert policy.site == "st-marys"
    assert notes == "3 notes of 2 patients; not used: 1 field missing: text"
    assert not policy.ledger.parent.exists()


def test_notes_without_patients_cannot_have_patients_as_unit(write: Write, tmp_path: Path) -> None:
    notes = {"source": "jsonl", "path": str(tmp_path / "notes.jsonl")}
    assert complaint(write(notes=notes)).startswith("notes.patient_field=null: name the field")
    preflight(write(notes=notes, privacy=PRIVACY | {"unit": "note"}))
    preflight(write(notes=notes, privacy=PRIVACY | {"required": False}))


def test_notes_and_model_must_be_there(write: Write) -> None:
    absent = {"source": "fhir", "path": "/nowhere"}
    assert complaint(write(notes=absent)).startswith("notes.path=/nowhere: no such file")
    assert complaint(write(model={"source": "path", "path": "/nowhere"})).startswith("model.path")


def test_notes_that_no_round_could_use_are_known_before_the_first(
    write: Write, tmp_path: Path
) -> None:
    notes = {"source": "jsonl", "path": str(tmp_path / "notes.jsonl"), "patient_field": "pid"}
    said = complaint(write(notes=notes | {"text_field": "body"}))
    assert "4 field missing: body" in said
    assert "aspirin" not in said


def test_what_nobody_foresaw_of_a_note_is_not_quoted(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("cannot parse: aspirin 100 mg for Jane Roe")

    monkeypatch.setattr("client.preflight.load_notes", broken)
    said = complaint(write())
    assert said.startswith("the notes cannot be read (RuntimeError ")
    assert "Jane" not in said


def test_a_ledger_that_does_not_verify_is_known_before_the_first_round(write: Write) -> None:
    file = write()
    with Ledger.of(read_policy(file)) as ledger:
        ledger.reserve((GaussianSteps(0.1, 1.0, 1),), task="a")
    path = preflight(file)[0].ledger
    path.with_name(path.name + ".key").write_bytes(b"another secret, of as many bytes" * 2)
    assert str(path) in complaint(file)


def test_a_ledger_that_has_vanished_is_known_before_the_first_round(write: Write) -> None:
    file = write()
    path = read_policy(file).ledger
    with Ledger.of(read_policy(file)):
        pass
    path.unlink()
    assert str(path) in complaint(file)


def test_a_ledger_needs_a_folder_that_can_be_written(write: Write, tmp_path: Path) -> None:
    for key in ("ledger", "site_key", "anchor"):
        line = complaint(write(**{key: str(tmp_path / "notes.jsonl" / "file")}))
        assert line.startswith(f"{key}=")
        assert line.endswith(f"may not write in {tmp_path / 'notes.jsonl'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_ledger_needs_a_folder_that_this_account_may_write(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "others"
    folder.mkdir(mode=0o500)
    line = complaint(write(ledger=str(folder / "wardround" / "ledger.sqlite")))
    assert line.endswith(f"may not write in {folder}")


def test_where_notes_left_without_privacy_no_private_run_is_joined(write: Write) -> None:
    open_site = write(privacy=PRIVACY | {"required": False})
    mark_unprotected(read_policy(open_site))
    preflight(open_site)
    private = write()
    mark = unprotected_mark(read_policy(private))
    assert (
        complaint(private) == f"privacy.required=true: {mark} says that notes left without privacy"
    )
