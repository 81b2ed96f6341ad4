"""A short clinical text about one visit, in one of several phrasings, and what it tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from simulation.visits import Diagnosis, Medication, Visit

T = TypeVar("T", Diagnosis, Medication)

_MOST_NAMES = 3  # diagnoses, and medications, that one text tells


@dataclass(frozen=True)
class Case:
    """A visit, the diagnoses and medications that the text names (at least one each), the text."""

    visit: Visit
    diagnoses: tuple[Diagnosis, ...]
    medications: tuple[Medication, ...]
    text: str


@dataclass(frozen=True)
class Vocabulary:
    """All names in an export, each once. Flawed answers borrow from what is foreign to a case:
    neither in the patient's whole record nor in the text."""

    diagnoses: tuple[Diagnosis, ...]
    medications: tuple[Medication, ...]
    departments: tuple[str, ...]

    def foreign_diagnoses(self, case: Case) -> list[Diagnosis]:
        """Diagnoses of other patients only; no two of them share a code."""
        text = case.text.lower()
        unknown = [item for item in self.diagnoses if not case.visit.has_diagnosis(item)]
        return [item for item in unknown if item.name.lower() not in text]

    def foreign_medications(self, case: Case) -> list[Medication]:
        """Drugs that only other patients take; no two of them share a name."""
        text = case.text.lower()
        unknown = [item for item in self.medications if not case.visit.takes(item)]
        return [item for item in unknown if item.name.lower() not in text]


def vocabulary(visits: Iterable[Visit]) -> Vocabulary:
    """Collect every name in ``visits``."""
    diagnoses: dict[str, Diagnosis] = {}
    medications: dict[str, Medication] = {}
    departments = set()
    for visit in visits:
        departments.add(visit.department)
        for diagnosis in visit.diagnoses:
            diagnoses.setdefault(diagnosis.code, diagnosis)
        for medication in visit.medications:
            medications.setdefault(medication.name.lower(), medication)
    return Vocabulary(
        tuple(diagnoses.values()), tuple(medications.values()), tuple(sorted(departments))
    )


def compose(visit: Visit, rng: Random) -> Case:
    """Tell a part of the visit: 30 to 120 tokens; which names, and in which words, is drawn."""
    diagnoses, medications = _some(visit.diagnoses, rng), _some(visit.medications, rng)
    noun, age, department = sex_noun(visit), visit.age, visit.department
    place = {
        "outpatient": f"in the outpatient clinic of {department}",
        "emergency": f"in the emergency department by {department}",
        "inpatient": f"as an inpatient of {department}",
    }[visit.setting]
    named = "; ".join(item.name for item in diagnoses)
    ordered = [f"{item.name} {item.dose}".strip() for item in medications]
    opening = rng.choice(
        [
            f"{age}-year-old {noun} seen {place}.",
            f"Patient: {visit.sex}, {age} years. Seen {place}.",
            f"This {age}-year-old {noun} was treated {place}.",
            f"Visit {place}. The patient is a {age}-year-old {noun}.",
        ]
    )
    problems = rng.choice(["Diagnoses", "Problem list", "Assessment", "Known conditions"])
    treatment = rng.choice(
        [
            f"Medications: {', '.join(ordered)}.",
            f"Treatment is {listed(ordered)}.",
            f"The patient receives {listed(ordered)}.",
            f"Orders: {'; '.join(ordered)}.",
        ]
    )
    return Case(visit, diagnoses, medications, f"{opening} {problems}: {named}. {treatment}")


def sex_noun(visit: Visit) -> str:
    """Woman, boy and so on; patient where the record states neither sex."""
    words = ("girl", "boy") if visit.age < 18 else ("woman", "man")
    return {"female": words[0], "male": words[1]}.get(visit.sex, "patient")


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _some(items: tuple[T, ...], rng: Random) -> tuple[T, ...]:
    chosen = sorted(rng.sample(range(len(items)), min(_MOST_NAMES, len(items))))
    return tuple(items[place] for place in chosen)
