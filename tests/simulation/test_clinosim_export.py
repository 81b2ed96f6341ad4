"""Merging exports: ids of different calls never meet, and references keep their targets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from simulation.clinosim_export import MANIFEST, TYPES, merge, qualify
from simulation.profiles import PROFILES, Profile, commands, seed_of

NOTE: dict[str, Any] = {
    "resourceType": "Composition",
    "id": "comp-1",
    "identifier": {"system": "urn:x", "value": "key-1"},
    "subject": {"reference": "Patient/pt-1"},
    "section": [{"title": "Plan", "entry": [{"reference": "Observation/obs-1"}]}],
}


def test_qualify_renames_ids_identifiers_and_references_alone() -> None:
    before = json.dumps(NOTE)
    assert qualify(NOTE, "north-0") == {
        "resourceType": "Composition",
        "id": "north-0-comp-1",
        "identifier": {"system": "urn:x", "value": "north-0-key-1"},
        "subject": {"reference": "Patient/north-0-pt-1"},
        "section": [{"title": "Plan", "entry": [{"reference": "Observation/north-0-obs-1"}]}],
    }
    assert json.dumps(NOTE) == before
    several = {
        "resourceType": "DocumentReference",
        "id": "doc-1",
        "masterIdentifier": {"value": "m"},
        "identifier": [{"value": "a"}, {"system": "no value"}],
    }
    renamed = qualify(several, "n-1")
    assert renamed["masterIdentifier"] == {"value": "n-1-m"}
    assert renamed["identifier"] == [{"value": "n-1-a"}, {"system": "no value"}]


def test_merge_keeps_same_ids_of_different_calls_apart(tmp_path: Path) -> None:
    exports = []
    for part in ("one", "two"):
        export = tmp_path / part
        export.mkdir()
        (export / "Patient.ndjson").write_text('{"resourceType": "Patient", "id": "pt-1"}\n')
        (export / "Observation.ndjson").write_text('{"resourceType": "Observation", "id": "o"}\n')
        exports.append(export)
    (exports[0] / "Composition.ndjson").write_text(json.dumps(NOTE) + "\n", encoding="utf-8")
    merge(exports, tmp_path / "out", "north")

    patients = (tmp_path / "out" / "Patient.ndjson").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in patients] == ["north-0-pt-1", "north-1-pt-1"]
    assert not (tmp_path / "out" / "Observation.ndjson").exists()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text(encoding="utf-8"))
    listed = {file["type"]: file for file in manifest["output"]}
    assert list(listed) == list(TYPES)
    assert (listed["Patient"]["count"], listed["Composition"]["count"]) == (2, 1)
    for file in listed.values():
        content = (tmp_path / "out" / file["url"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_commands_follow_the_profile_and_no_seed_comes_twice() -> None:
    profile = Profile("x", "", general=0.5, admissions={"acute_mi": 6}, visits={"syncope": 1})
    lines = commands(profile, 150, 7, Path("conf"))
    assert [line[0] for line in lines] == ["simulate", "test-disease", "test-encounter"]
    assert lines[0][lines[0].index("-p") + 1] == "75"
    assert lines[0][lines[0].index("--hospital-config") + 1] == "conf/hospital_operations.yaml"
    assert [line[line.index("-n") + 1] for line in lines[1:]] == ["9", "2"]
    seeds = [
        int(line[line.index("-s") + 1])
        for hospital in PROFILES
        for seed in (7, 8)
        for line in commands(hospital, 150, seed, Path("conf"))
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 + 100 for seed in seeds)
    assert seed_of(7, "north") == seed_of(7, "north")
