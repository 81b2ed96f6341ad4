"""What a FHIR export states about each visit: the facts that instructions are made from.

Only structured records are read (Patient, Encounter, Condition, MedicationRequest), never a note.
A visit is kept if it has an age of at least one year, a coded diagnosis and a coded medication.
Names that a sentence cannot carry are left out: those longer than 60 characters, those of three or
fewer (order shorthand such as "NS"), and occasions that have an ICD-10-CM code but are no diagnosis
(chapter Z, and every "Encounter for ...").
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from simulation.case_mix import is_icd10, resources

SETTINGS = {"AMB": "outpatient", "EMER": "emergency", "IMP": "inpatient"}
_LONGEST_NAME = 60
_SHORTEST_NAME = 4
# A single dose, alone or followed by its route; ranges, ratios and weight-based doses do not match.
_DOSE = re.compile(r"(\d+(?:\.\d+)?)(mg|mcg|g|IU)(?: (?:PO|IV|SC|IM|INH|INHALED|NEB)\b.*)?")


@dataclass(frozen=True)
class Diagnosis:
    """An ICD-10-CM code and its official name."""

    code: str
    name: str


@dataclass(frozen=True)
class Medication:
    """A drug: RxNorm code, name as ordered, and dose with unit ("" if not one plain dose)."""

    code: str
    name: str
    dose: str


@dataclass(frozen=True)
class Visit:
    """One encounter, and what the patient's whole record holds.

    Parameters
    ----------
    age
        Full years at the start of the encounter.
    diagnoses, medications
        Of this encounter, in the order of the record; never empty.
    categories, drugs
        Of the whole record, with what is left out above: ICD-10-CM categories (three characters),
        and RxNorm codes and lower-case names. Outside these a statement is false of the patient.
    """

    patient: str
    age: int
    sex: str
    setting: str
    department: str
    diagnoses: tuple[Diagnosis, ...]
    medications: tuple[Medication, ...]
    categories: frozenset[str]
    drugs: frozenset[str]

    def has_diagnosis(self, other: Diagnosis) -> bool:
        """True if the record holds a diagnosis of the same ICD-10-CM category."""
        return other.code[:3] in self.categories

    def takes(self, other: Medication) -> bool:
        """True if the record holds an order for the same drug, by code or by name."""
        return other.code in self.drugs or other.name.lower() in self.drugs


def read_visits(export: Path) -> list[Visit]:
    """The distinct visits in a bulk export, in the order of its files.

    Raises
    ------
    FileNotFoundError
        The export lacks one of the four types.
    """
    patients = {item["id"]: item for item in resources(export, "Patient")}
    diagnoses: dict[str, Diagnosis] = {}
    categories: dict[str, set[str]] = defaultdict(set)
    for item in resources(export, "Condition"):
        coding = item["code"]["coding"][0]
        categories[_target(item["subject"])].add(coding["code"][:3])
        if is_icd10(coding["code"]) and _is_diagnosis(coding) and _usable(coding["display"]):
            diagnoses[item["id"]] = Diagnosis(coding["code"], coding["display"])
    orders: dict[str, dict[str, Medication]] = defaultdict(dict)
    drugs: dict[str, set[str]] = defaultdict(set)
    for item in resources(export, "MedicationRequest"):
        medication = _medication(item)
        drugs[_target(item["subject"])] |= {medication.code, medication.name.lower()}
        if medication.code and _usable(medication.name):
            # Some drugs are ordered under two codes: once is enough for a sentence.
            orders[_target(item["encounter"])].setdefault(medication.name.lower(), medication)
    visits: dict[Visit, None] = {}
    for item in resources(export, "Encounter"):
        who = _target(item["subject"])
        linked = (_target(link["condition"]) for link in item.get("diagnosis", []))
        named = dict.fromkeys(diagnoses[key] for key in linked if key in diagnoses)
        visit = Visit(
            patient=who,
            age=_years(patients[who]["birthDate"], item["period"]["start"]),
            sex=patients[who]["gender"],
            setting=SETTINGS.get(item["class"]["code"], ""),
            department=item.get("serviceType", {}).get("text", ""),
            diagnoses=tuple(named),
            medications=tuple(orders[item["id"]].values()),
            categories=frozenset(categories[who]),
            drugs=frozenset(drugs[who]),
        )
        if visit.age and visit.setting and visit.department and named and visit.medications:
            visits[visit] = None
    return list(visits)


def _target(reference: dict[str, Any]) -> str:
    return str(reference["reference"]).partition("/")[2]


def _is_diagnosis(coding: dict[str, str]) -> bool:
    return coding["code"][0] != "Z" and not coding["display"].startswith("Encounter for")


def _usable(name: str) -> bool:
    return _SHORTEST_NAME <= len(name) <= _LONGEST_NAME and name[0].isalpha()


def _years(born: str, on: str) -> int:
    birth, day = date.fromisoformat(born), date.fromisoformat(on[:10])
    return day.year - birth.year - ((day.month, day.day) < (birth.month, birth.day))


def _medication(request: dict[str, Any]) -> Medication:
    concept = request["medicationCodeableConcept"]
    code = next((coding["code"] for coding in concept.get("coding", [])), "")
    dosages = request.get("dosageInstruction") or [{}]
    plain = _DOSE.fullmatch(dosages[0].get("text") or "")
    return Medication(code, concept["text"], f"{plain[1]} {plain[2]}" if plain else "")
