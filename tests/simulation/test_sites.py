"""Hospitals of a simulation: who gets which patients, and what each is allowed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.notes.load import load_notes
from client.notes.split import split_units
from client.site import read_policy
from conf.load import ConfigError, load
from conf.schema import RunSettings
from server.run_folder import RunFolder
from simulation.sites import Hospitals, Site, prepare

Row = tuple[str, str, str | None]  # note id, patient, hospital
Make = Callable[..., Hospitals]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write notes and prepare hospitals of them; ``named`` tells runs apart."""

    def prepared(rows: list[Row], *overrides: str, named: str = "run") -> Hospitals:
        path = tmp_path / f"{named}.jsonl"
        keys = ("id", "pid", "ward")
        lines = [dict(zip(keys, r, strict=True)) | {"text": f"Note {r[0]}, seen."} for r in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        wanted = [
            "notes=jsonl", f"notes.path={path}", "notes.note_field=id", "notes.patient_field=pid",
            "notes.hospital_field=ward", "notes.min_chars=5", "notes.holdout=0.5",
            "hospitals=by_field", *overrides,
        ]  # fmt: skip
        folder = RunFolder(tmp_path / named)
        settings = load("simulate", wanted, RunSettings)
        return prepare(settings, folder.create(settings), lambda *_: None)

    return prepared


def rows(**patients: int) -> list[Row]:
    """Two notes of each of so many patients a hospital."""
    return [
        (f"{ward}{i}{part}", f"{ward}-{i}", ward)
        for ward, count in patients.items()
        for i in range(count)
        for part in "ab"
    ]


def ids(site: Site) -> list[str]:
    """Ids of the notes that the site reads."""
    return [note.note_id for note in load_notes(site.policy.notes).notes]


def patients(site: Site) -> set[str]:
    """Patients at the site."""
    return {str(note.patient_id) for note in load_notes(site.policy.notes).notes}


def test_the_largest_hospitals_are_kept_with_all_their_notes(make: Make) -> None:
    wanted = rows(small=9, large=20, middle=12)
    sites = make(wanted, "hospitals.count=2").sites
    assert [site.name for site in sites] == ["large", "middle"]
    for site in sites:
        assert site.stands_for == (site.name,)
        assert ids(site) == [note for note, _, ward in wanted if ward == site.name]


def test_hospitals_of_the_same_size_are_kept_in_name_order(make: Make) -> None:
    sites = make(rows(c=10, a=10, b=10), "hospitals.count=2").sites
    assert [site.name for site in sites] == ["a", "b"]


def test_a_patient_of_several_hospitals_is_at_the_one_with_most_notes(make: Make) -> None:
    shared: list[Row] = [
        ("1", "walker", "west"), ("2", "walker", "east"), ("3", "walker", "west"),
        ("4", "evener", "west"), ("5", "evener", "east"),
    ]  # fmt: skip
    east, west = make(rows(east=12, west=12) + shared, "hospitals.count=2").sites
    assert {"1", "2", "3"} <= set(ids(west))
    assert {"4", "5"} <= set(ids(east))  # as many in both: the first in name order
    assert not patients(east) & patients(west)


def test_no_patient_is_ever_at_two_hospitals(make: Make) -> None:
    draw = random.Random(4)
    mixed: list[Row] = [
        (str(n), f"p{draw.randrange(80)}", draw.choice(["a", "b", "c"])) for n in range(400)
    ]
    sites = make(mixed, "hospitals.count=3").sites
    everyone = Counter(patient for site in sites for patient in patients(site))
    assert set(everyone.values()) == {1}
    assert set(everyone) == {patient for _, patient, _ in mixed}
    assert sum(len(ids(site)) for site in sites) == 400


def test_without_patient_ids_every_note_stays_where_it_is(make: Make) -> None:
    mixed = rows(a=20, b=20)
    hospitals = make(mixed, "hospitals.count=2", "notes.patient_field=null")
    assert hospitals.has_patients is False
    for site in hospitals.sites:
        assert site.policy.notes.patient_field is None
        assert ids(site) == [note for note, _, ward in mixed if ward == site.name]


def refusal(make: Make, *overrides: str, of: list[Row]) -> str:
    """The one line that refuses to make hospitals of these notes."""
    with pytest.raises(ConfigError) as caught:
        make(of, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["by_field", "separate"])
def test_too_few_values_of_the_field_are_told(make: Make, layout: str) -> None:
    wanted = ("hospitals.count=4", f"hospitals={layout}")
    assert refusal(make, *wanted, of=rows(a=9, b=9)) == (
        "hospitals.count=4: notes.hospital_field=ward has only 2 values"
    )


def test_several_hospitals_need_a_field_that_tells_them_apart(make: Make) -> None:
    message = refusal(make, "notes.hospital_field=null", of=rows(a=9))
    assert message.startswith("notes.hospital_field must name the field")
    assert "hospitals=pooled" in message


def test_one_hospital_needs_no_field(make: Make) -> None:
    options = ("notes.hospital_field=null", "hospitals.count=1")
    (site,) = make(rows(a=9, b=9), *options).sites
    assert site.name == "all"
    assert len(ids(site)) == 36


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pooled_and_federated_hold_out_the_same_patients(make: Make, count: int) -> None:
    wanted, size = rows(a=30, b=20, c=25), f"hospitals.count={count}"
    federated = make(wanted, size, named="federated")
    (pooled,) = make(wanted, size, "hospitals=pooled", named="pooled").sites
    assert pooled.name == "pooled"
    assert pooled.stands_for == tuple(site.name for site in federated.sites)

    def held_out(site: Site) -> set[str]:
        return set(split_units(load_notes(site.policy.notes).units(), 0.5)[1])

    assert held_out(pooled) == set().union(*(held_out(site) for site in federated.sites))
    assert sorted(ids(pooled)) == sorted(i for site in federated.sites for i in ids(site))
    origin = {note.note_id: note.hospital for note in load_notes(pooled.policy.notes).notes}
    assert all(origin[i] == site.name for site in federated.sites for i in ids(site))


def test_at_most_so_many_patients_are_kept_whole_whatever_their_order(make: Make) -> None:
    wanted = rows(a=30, b=12)
    kept = []
    for order in (wanted, wanted[::-1]):
        a, b = make(order, "hospitals.count=2", "hospitals.max_units=15").sites
        assert (len(patients(a)), len(ids(a))) == (15, 30)
        assert (len(patients(b)), len(ids(b))) == (12, 24)
        kept.append(patients(a))
    assert kept[0] == kept[1]
    assert kept[0] != {f"a-{i}" for i in range(15)}


def test_a_hospital_needs_patients_on_both_sides(make: Make) -> None:
    options = ("hospitals.count=1", "hospitals.max_units=8")
    assert refusal(make, *options, "notes.holdout=0.001", of=rows(a=9)) == (
        "hospital a: 0 of its 8 patients are held out (notes.holdout=0.001); "
        "it needs more of them, or another share"
    )
    message = refusal(make, *options, "notes.holdout=0.999", of=rows(a=9))
    assert message.startswith("hospital a: 8 of its 8 patients are held out")


def test_field_values_become_names_that_a_folder_can_have(make: Make) -> None:
    wards = ["Ward 3 / B", "Ward 3 - B", "内科", "外科", "global", "../../etc", "x" * 90]
    wanted = rows(**dict.fromkeys(wards, 9))
    sites = make(wanted, f"hospitals.count={len(wards)}").sites
    names = {site.name for site in sites}
    assert len(names) == len(wards)
    assert "global" not in names  # there, the merged adapter is kept
    assert all(site.policy.ledger.name == f"{site.name}.sqlite" for site in sites)
    assert sum(len(ids(site)) for site in sites) == len(wanted)
    assert {"Ward-3---B", "etc", "unnamed", "global-2"} <= names
    assert max(map(len, names)) < 63


def test_the_policy_allows_the_plan_and_no_more(make: Make, tmp_path: Path) -> None:
    options = ("hospitals.count=1", "privacy.epsilon=2.5", "privacy.delta=1e-6", "adapter.rank=3")
    more = ("privacy.clip_norm=0.7", "privacy.max_tokens=4096")
    (site,) = make(rows(a=9), *options, *more).sites
    policy: Any = site.policy
    assert policy == read_policy(tmp_path / "run" / "sites" / "a.yaml")
    assert policy.privacy.required is True
    assert (policy.privacy.epsilon, policy.privacy.delta) == (2.5, 1e-6)
    assert (policy.privacy.max_clip_norm, policy.privacy.max_tokens) == (0.7, 4096)
    assert policy.adapter.max_rank == 3
    assert policy.adapter.targets == ("q_proj", "v_proj")
    assert {policy.share.counts, policy.share.losses, policy.share.scores} == {"never"}
    assert policy.privacy.max_sampling_rate == 0.25
    assert policy.adapter.train == ("B",)
    assert policy.ledger == tmp_path / "run" / "ledger" / "a.sqlite"
    assert policy.notes.path == tmp_path / "run" / "notes" / "a.jsonl"


def test_only_without_privacy_none_is_required(make: Make) -> None:
    (site,) = make(rows(a=9), "hospitals.count=1", "privacy=none").sites
    assert site.policy.privacy.required is False


def test_rejected_records_are_counted_and_given_to_nobody(make: Make) -> None:
    bad: list[Row] = [("bad", "p", None)]
    hospitals = make(rows(a=9, b=9) + bad, "hospitals.count=2")
    assert hospitals.unplaced == 1
    assert [site.rejected for site in hospitals.sites] == [None, None]
    sound = make(rows(a=9, b=9), "hospitals.count=2", named="sound")
    assert sound.unplaced == 0
    assert [site.rejected for site in sound.sites] == [0, 0]
