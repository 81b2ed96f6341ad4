"""From settings to simulated hospitals: each gets notes, a ledger and a site policy of its own.

Layouts: ``separate`` (one clinosim export a hospital, or the largest values of
``notes.hospital_field``), ``by_field`` (the same for any notes) and ``pooled`` (everything at one
site, the reference that a federation is measured against). A patient whose notes carry several
values of the field goes to the hospital with most of them, so no patient is at two hospitals.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from adapters.base_model import cache_folder
from client.notes.load import load_notes
from client.notes.note import Note
from client.notes.split import split_units
from client.site import read_policy
from conf.commands import AuditCommand
from conf.load import ConfigError
from conf.policy import AdapterLimits, PrivacyLimits, ShareLimits, SitePolicy
from conf.schema import MAX_CLIP_NORM, NotesSettings, RunSettings
from server.run_folder import RunFolder, write_atomically
from simulation.cohort import hospital_orders, simulate

log = logging.getLogger(__name__)

POOLED = "pooled"
_UNPLACED = ""  # in place of a hospital's name
_RESERVED = "global"  # beside the hospitals' adapters lies what they merged to, under this name
Progress = Callable[[str, int, int], None]
Notes = list[Note]


@dataclass(frozen=True)
class Site:
    """A simulated hospital: its policy, and the hospitals whose notes it holds."""

    policy: SitePolicy
    stands_for: tuple[str, ...]
    rejected: int | None  # records; None where it is not known whose they were

    @property
    def name(self) -> str:
        """Name in the federation."""
        return self.policy.site


@dataclass(frozen=True)
class Hospitals:
    """All sites of a run, and how many rejected records belong to none that is known."""

    sites: tuple[Site, ...]
    has_patients: bool
    unplaced: int


def require_hospital_field(settings: RunSettings) -> None:
    """Return when the settings can tell several hospitals apart. Raises ConfigError."""
    hospitals, notes = settings.hospitals, settings.notes
    by_field = notes.source != "clinosim" or hospitals.layout == "by_field"
    several = hospitals.count > 1 and hospitals.layout != "pooled"
    if by_field and several and notes.hospital_field is None:
        raise ConfigError(
            "notes.hospital_field must name the field that says which hospital a note is from "
            "(or use hospitals=pooled)"
        )


def prepare(settings: RunSettings, folder: RunFolder, progress: Progress) -> Hospitals:
    """Write notes, policies and ledger places of every simulated hospital into the run folder.

    Raises ConfigError when the notes do not give the hospitals asked for, and NotesError when they
    cannot be read.
    """
    require_hospital_field(settings)
    origins, rejected, has_patients = _notes_by_hospital(settings, progress)
    if settings.hospitals.max_units:
        origins = {
            name: _some_units(notes, settings.hospitals.max_units)
            for name, notes in origins.items()
        }
    for name, notes in origins.items():
        _require_both_sides(name, notes, settings.notes.holdout)
    groups = (
        {POOLED: tuple(origins)}
        if settings.hospitals.layout == "pooled"
        else {n: (n,) for n in origins}
    )
    sites = []
    for name, members in groups.items():
        notes = [note for member in members for note in origins[member]]
        file = _write_notes(folder, name, members, origins)
        policy = site_policy(settings, folder.path, name, file, has_patients)
        text = yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False)
        target = folder.path / "sites" / f"{name}.yaml"
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, text)
        lost = None if rejected[_UNPLACED] else sum(rejected[m] for m in members)
        sites.append(Site(read_policy(target), members, lost))
        log.info("%s: %d notes", name, len(notes))
    return Hospitals(tuple(sites), has_patients, rejected[_UNPLACED])


def _notes_by_hospital(
    settings: RunSettings, progress: Progress
) -> tuple[dict[str, Notes], Counter[str], bool]:
    """Notes by hospital in name order, rejected records by hospital, and whether ids are there."""
    wanted = settings.notes
    if wanted.source != "clinosim":
        found = load_notes(wanted)
        rejected = Counter({_UNPLACED: len(found.rejected)})
        return _by_field(list(found.notes), settings), rejected, found.has_patients
    orders = hospital_orders(settings.hospitals.count, settings.hospitals.population, settings.seed)
    hospitals = simulate(orders, cache_folder() / "clinosim", progress)
    by_name: dict[str, Notes] = {}
    rejected = Counter()
    for hospital in hospitals:
        export = wanted.model_copy(update={"source": "fhir", "path": hospital.export})
        found = load_notes(export)
        by_name[hospital.name] = list(found.notes)
        rejected[hospital.name] = len(found.rejected)
    if settings.hospitals.layout == "by_field":
        rejected = Counter({_UNPLACED: rejected.total()})
        return _by_field([n for notes in by_name.values() for n in notes], settings), rejected, True
    return by_name, rejected, True


def _by_field(notes: Notes, settings: RunSettings) -> dict[str, Notes]:
    """The ``hospitals.count`` largest hospitals by number of notes, each patient at one of them."""
    wanted = settings.hospitals.count
    homes: dict[str, Counter[str]] = defaultdict(Counter)
    for note in notes:
        homes[note.unit][note.hospital or "all"] += 1
    home = {unit: max(sorted(votes), key=votes.__getitem__) for unit, votes in homes.items()}
    grouped: dict[str, Notes] = defaultdict(list)
    for note in notes:
        grouped[home[note.unit]].append(note)
    largest = sorted(grouped, key=lambda name: (-len(grouped[name]), name))[:wanted]
    if len(largest) < wanted and settings.hospitals.layout != "pooled":
        raise ConfigError(
            f"hospitals.count={wanted}: notes.hospital_field={settings.notes.hospital_field} "
            f"has only {len(largest)} values"
        )
    values = sorted(largest)
    return {n: grouped[value] for n, value in zip(_site_names(values), values, strict=True)}


def _write_notes(
    folder: RunFolder, name: str, members: tuple[str, ...], origins: Mapping[str, Notes]
) -> Path:
    """One JSONL file with the site's notes; ``hospital`` keeps where each came from."""
    target = folder.path / "notes" / f"{name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    lines = [
        json.dumps(
            {
                "note_id": note.note_id,
                "patient": note.patient_id,
                "hospital": member,
                "text": note.text,
            },
            ensure_ascii=False,
        )
        for member in members
        for note in origins[member]
    ]
    write_atomically(target, "\n".join(lines) + "\n")
    return target


def site_policy(
    settings: RunSettings | AuditCommand, folder: Path, name: str, notes: Path, has_patients: bool
) -> SitePolicy:
    """A policy that allows exactly the run's plan: simulated hospitals have no other wishes.

    ``notes`` is a JSONL file with ``text``, ``note_id``, ``patient`` and ``hospital``; the ledger
    lies in ``folder``.
    """
    privacy, root = settings.privacy, folder.resolve()
    return SitePolicy(
        site=name,
        lineage=f"{name}-{settings.seed}",
        ledger=root / "ledger" / f"{name}.sqlite",
        notes=NotesSettings(
            source="jsonl",
            path=notes.resolve(),
            text_field="text",
            note_field="note_id",
            patient_field="patient" if has_patients else None,
            hospital_field="hospital",
            min_chars=settings.notes.min_chars,
            max_chars=settings.notes.max_chars,
            holdout=settings.notes.holdout,
        ),
        model=settings.model,
        compute=settings.compute,
        privacy=PrivacyLimits(
            required=privacy.enabled,
            unit=privacy.unit,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            min_noise_multiplier=0.0,
            max_sampling_rate=privacy.sampling_rate,
            max_clip_norm=min(privacy.clip_norm, MAX_CLIP_NORM),
            max_notes_per_unit=privacy.max_notes_per_unit,
            max_tokens=privacy.max_tokens,
        ),
        adapter=AdapterLimits(
            max_rank=settings.adapter.rank,
            targets=settings.adapter.targets,
            train=(settings.adapter.train,),
        ),
        share=ShareLimits(statistics="noised"),  # where the strategy asks for them
    )


def _some_units(notes: Notes, most: int) -> Notes:
    """Notes of ``most`` units, chosen by hash: the first in a file are seldom like the rest."""
    units = {note.unit for note in notes}
    kept = set(sorted(units, key=lambda u: hashlib.sha256(f"kept:{u}".encode()).digest())[:most])
    return [note for note in notes if note.unit in kept]


def _require_both_sides(name: str, notes: Notes, holdout: float) -> None:
    """Raises ConfigError where a hospital has nobody to train on, or nobody to measure with."""
    units = {note.unit: (note,) for note in notes}
    sides = split_units(units, holdout)
    if not all(sides):
        raise ConfigError(
            f"hospital {name}: {len(sides[1])} of its {len(units)} patients are held out "
            f"(notes.holdout={holdout}); it needs more of them, or another share"
        )


def _site_names(values: Sequence[str]) -> list[str]:
    """A name for each field value: letters, digits and dashes; no two alike, none reserved."""
    taken = [_RESERVED]
    for value in values:
        cleaned = "".join(c if c.isalnum() and c.isascii() else "-" for c in value).strip("-")
        name = cleaned[:56] or "unnamed"
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        known = {n.casefold() for n in taken}  # some disks know no case
        taken.append(next(n for n in names if n.casefold() not in known))
    return taken[1:]
