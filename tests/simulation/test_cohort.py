"""Simulated hospitals: reproducible, disjoint, different, and never half written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from simulation.case_mix import case_mix, distance, resources
from simulation.clinosim_export import TYPES
from simulation.cohort import (
    Order,
    SimulatedHospital,
    SimulationError,
    hospital_orders,
    public_cohort,
    public_order,
    simulate,
    simulate_hospitals,
)
from simulation.instructions import write_instructions
from simulation.profiles import Profile

# Real clinosim without a catchment: a few emergency visits take two seconds.
TINY = Profile("tiny", "a test", general=0, visits={"migraine": 20, "syncope": 10})
BROKEN = Profile("broken", "a test", general=0, visits={"no_such_condition": 10})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def references(node: object) -> set[str]:
    if isinstance(node, list):
        return {found for item in node for found in references(item)}
    if not isinstance(node, dict):
        return set()
    own = {node["reference"]} if isinstance(node.get("reference"), str) else set()
    return own | {found for item in node.values() for found in references(item)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> SimulatedHospital:
    return simulate([Order(TINY, 20, 1)], cache)[0]


def test_export_holds_the_patients_asked_for_with_unique_ids(tiny: SimulatedHospital) -> None:
    assert {path.name for path in tiny.export.iterdir()} == {
        "manifest.json",
        *(f"{kind}.ndjson" for kind in TYPES),
    }
    assert tiny.patients == 4 + 2
    ids = [item["id"] for kind in TYPES for item in resources(tiny.export, kind)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"tiny-[01]-[A-Za-z0-9.-]{1,56}", key) for key in ids)
    notes = len(list(resources(tiny.export, "Composition")))
    assert tiny.notes == notes + len(list(resources(tiny.export, "DocumentReference")))
    assert notes >= tiny.patients


def test_references_within_the_export_lead_somewhere(tiny: SimulatedHospital) -> None:
    ids = {f"{kind}/{item['id']}" for kind in TYPES for item in resources(tiny.export, kind)}
    for kind in TYPES:
        for item in resources(tiny.export, kind):
            inside = {to for to in references(item) if to.partition("/")[0] in TYPES}
            assert inside <= ids
            assert kind == "Patient" or item["subject"]["reference"] in ids


def test_second_call_takes_the_cache(tiny: SimulatedHospital, cache: Path) -> None:
    before = (tiny.export / "manifest.json").stat().st_mtime_ns
    seen: list[tuple[str, int, int]] = []
    again = simulate([Order(TINY, 20, 1)], cache, lambda *step: seen.append(step))
    assert again == [tiny]
    assert seen == [("tiny", 1, 1)]
    assert (tiny.export / "manifest.json").stat().st_mtime_ns == before


def test_damage_is_repaired_with_the_same_bytes(tmp_path: Path) -> None:
    made = simulate([Order(TINY, 20, 2)], tmp_path)[0]
    good = contents(made.export)
    with (made.export / "Condition.ndjson").open("ab") as file:
        file.write(b"{}\n")
    assert simulate([Order(TINY, 20, 2)], tmp_path) == [made]
    assert contents(made.export) == good
    assert {path.name for path in tmp_path.iterdir()} == {
        made.export.name,
        f"{made.export.name}.log",
    }


def test_failure_is_one_line_with_the_log_and_leaves_nothing_half_done(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SimulationError, match="clinosim failed for hospital broken") as caught:
        simulate([Order(BROKEN, 20, 1)], tmp_path)
    assert "\n" not in str(caught.value)
    (log,) = tmp_path.iterdir()
    assert str(log) in str(caught.value)
    assert "no_such_condition" in log.read_text(encoding="utf-8")
    assert capfd.readouterr() == ("", "")  # clinosim's own output stays in the log


def test_interrupt_stops_the_other_run_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    slow = Profile("slow", "a test", general=1)

    def interrupt(*step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate([Order(TINY, 20, 3), Order(slow, 100, 3)], tmp_path, interrupt)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir() if path.is_dir()} == {"tiny"}


def test_orders_are_distinct_and_checked() -> None:
    orders = hospital_orders(100, 150, 7)
    assert len({order.profile.name for order in orders}) == 100
    assert [order.profile.name for order in orders[:6]] == [
        *("north", "harbor", "valley", "summit", "meadow"),
        "north2",
    ]
    for count in (0, 101):
        with pytest.raises(ValueError, match=f"hospitals: {count} asked for"):
            hospital_orders(count, 150, 7)
    with pytest.raises(ValueError, match="population: 19 is too small"):
        public_order(19, 7)


@pytest.mark.slow
def test_hospitals_differ_are_disjoint_and_reproducible(tmp_path: Path) -> None:
    """Three hospitals and the public cohort, by the real clinosim, and one of them twice."""
    orders = hospital_orders(3, 100, 7)
    # The first case mix at another seed: how far apart hospitals are by chance alone.
    twin = replace(orders[0], seed=8)
    *hospitals, other_seed, public = simulate([*orders, twin, public_order(60, 7)], tmp_path)
    assert simulate_hospitals(3, 100, 7, tmp_path) == hospitals
    assert public_cohort(60, 7, tmp_path) == public

    assert all(hospital.patients >= 40 and hospital.notes >= 150 for hospital in hospitals)
    patients = [{p["id"] for p in resources(h.export, "Patient")} for h in (*hospitals, public)]
    assert len(set.union(*patients)) == sum(map(len, patients))

    again = simulate(orders[2:], tmp_path / "again")[0]
    assert contents(again.export) == contents(hospitals[2].export)

    mixes = [case_mix(hospital.export) for hospital in hospitals]
    floor = distance(mixes[0].chapters, case_mix(other_seed.export).chapters)
    for one, other in combinations(mixes, 2):
        assert distance(one.chapters, other.chapters) > 1.3 * floor
        assert distance(one.note_types, other.note_types) > 0.2

    files = write_instructions(public.export, tmp_path / "instructions", 192, 24, 7)
    drugs = {
        item["medicationCodeableConcept"]["text"]
        for item in resources(public.export, "MedicationRequest")
    }
    for line in files.dpo.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task_type"] == "named entity recognition":
            names = json.loads(row["output"])
            assert all(name in row["input"] for name in next(iter(names.values())))
            assert set(names.get("medications", [])) <= drugs
