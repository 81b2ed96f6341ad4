"""Every instruction is true of its patient, every rejected answer false: checked from the records.

The oracle below never calls the makers: it knows the records (tables in this file), finds the
visit that an input tells, and works out each answer anew.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from simulation.instructions import split, write_instructions
from simulation.tasks import TASKS
from simulation.visits import read_visits

Row = dict[str, Any]

COLUMNS = [
    *("instruction", "input", "output", "task_type", "input_data", "output_format"),
    *("difficulty_level", "rejected_output", "error_type"),
    *("quality", "alignment", "coherence", "realism", "difficulty"),
]

# ICD-10-CM code: official name, chapter, abbreviation with its meaning.
DIAGNOSES = {
    "I10": ("Essential (primary) hypertension", "circulatory", "HTN", "hypertension"),
    "E78.5": ("Hyperlipidemia, unspecified", "endocrine or metabolic", "HLD", "hyperlipidemia"),
    "N18.9": (
        *("Chronic kidney disease, unspecified", "genitourinary"),
        *("CKD", "chronic kidney disease"),
    ),
    "J44.9": (
        *("Chronic obstructive pulmonary disease, unspecified", "respiratory"),
        *("COPD", "chronic obstructive pulmonary disease"),
    ),
    "M54.50": ("Low back pain, unspecified", "musculoskeletal", "", ""),
    "K81.0": ("Acute cholecystitis", "digestive", "", ""),
    "S93.409A": ("Sprain of unspecified ligament of unspecified ankle", "injury", "", ""),
}
DRUGS = {  # RxNorm code: name, dosage text, dose that a sentence may state
    "17767": ("Amlodipine", "5mg PO DAILY", "5 mg"),
    "83367": ("Atorvastatin", "10mg", "10 mg"),
    "274766": ("Tiotropium", "18mcg INH DAILY", "18 mcg"),
    "29046": ("Lisinopril", "10-20mg PO daily", ""),
    "35827": ("Ketorolac", "30mg PO DAILY", "30 mg"),
    "161": ("Acetaminophen", "500mg PO Q6H", "500 mg"),
}
Told = tuple[str, str, str, tuple[str, ...], tuple[str, ...]]
RECORDS: dict[str, tuple[str, str, tuple[Told, ...]]] = {  # sex, birth, visits
    "a": (
        *("female", "1950-07-01"),
        (
            ("AMB", "Internal Medicine", "2024-06-30", ("I10", "E78.5"), ("17767", "83367")),
            ("IMP", "General Surgery", "2024-09-01", ("K81.0", "I10"), ("161",)),
        ),
    ),
    "b": ("male", "1961-03-02", (("AMB", "Cardiology", "2024-04-01", ("I10",), ("29046",)),)),
    "c": ("male", "1990-01-20", (("EMER", "Trauma", "2024-05-05", ("S93.409A",), ("35827",)),)),
    "d": ("female", "2012-02-02", (("EMER", "Trauma", "2024-02-01", ("M54.50",), ("161",)),)),
    "e": (
        *("male", "1944-12-31"),
        (("AMB", "Pulmonology", "2024-12-30", ("J44.9", "I10", "N18.9"), ("274766", "17767")),),
    ),
    "f": (
        "female",
        "1970-10-10",
        (("AMB", "Internal Medicine", "2024-01-05", ("E78.5",), ("83367",)),),
    ),
    "g": (
        "female",
        "1955-05-05",
        (("IMP", "Cardiology", "2024-08-01", ("I10",), ("17767", "161")),),
    ),
    "h": ("male", "1980-08-08", (("IMP", "General Surgery", "2024-03-03", ("K81.0",), ("161",)),)),
    "i": (
        *("female", "1966-06-06"),
        (("AMB", "Internal Medicine", "2024-11-11", ("N18.9", "E78.5"), ("83367", "29046")),),
    ),
    "j": ("male", "1958-04-04", (("EMER", "Trauma", "2024-07-07", ("M54.50",), ("35827",)),)),
}
SETTINGS = {"AMB": "outpatient clinic", "EMER": "emergency department", "IMP": "inpatient"}


def coded(kind: str, key: str, who: str, code: str, display: str, **more: Any) -> Row:
    concept = {"coding": [{"code": code, "display": display}] if code else [], "text": display}
    subject = {"subject": {"reference": f"Patient/{who}"}}
    name = "code" if kind == "Condition" else "medicationCodeableConcept"
    return {"resourceType": kind, "id": key, name: concept, **subject, **more}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records above as a bulk export, with what real exports also hold and nothing may use."""
    rows: dict[str, list[Row]] = {
        kind: [] for kind in ("Patient", "Encounter", "Condition", "MedicationRequest")
    }
    for who, (sex, born, visits) in RECORDS.items():
        rows["Patient"].append({"id": who, "gender": sex, "birthDate": born})
        for number, (kind, service, day, codes, drugs) in enumerate(visits):
            key = f"{who}{number}"
            links = [*codes, "Z00.00", "copd_exacerbation"]
            for code in codes:
                rows["Condition"].append(
                    coded("Condition", f"{key}-{code}", who, code, DIAGNOSES[code][0])
                )
            occasion = "Encounter for general adult medical examination"
            rows["Condition"] += [
                coded("Condition", f"{key}-Z00.00", who, "Z00.00", occasion),
                coded("Condition", f"{key}-copd_exacerbation", who, "copd_exacerbation", "(none)"),
            ]
            visit = {"encounter": {"reference": f"Encounter/{key}"}}
            orders = [(code, *DRUGS[code][:2]) for code in drugs]
            orders += [("9863", "NS", "1000mL IV DAILY"), ("", "Broad spectrum antibiotic", "PO")]
            for code, name, dosage in orders:
                more = {**visit, "dosageInstruction": [{"text": dosage}]}
                rows["MedicationRequest"].append(
                    coded("MedicationRequest", f"{key}-{name}", who, code, name, **more)
                )
            rows["Encounter"].append(
                {
                    "id": key,
                    "class": {"code": kind},
                    "subject": {"reference": f"Patient/{who}"},
                    "serviceType": {"text": service},
                    "period": {"start": f"{day}T09:00:00Z"},
                    "diagnosis": [
                        {"condition": {"reference": f"Condition/{key}-{code}"}} for code in links
                    ],
                }
            )
    folder = tmp_path_factory.mktemp("export")
    for kind, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{kind}.ndjson").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rows(export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Row]]:
    files = write_instructions(export, tmp_path_factory.mktemp("out"), 320, 48, seed=3)
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in (("sft", files.sft), ("dpo", files.dpo), ("held_out", files.held_out))
    }


@dataclass(frozen=True)
class Truth:
    """What the records say of the patient that an input tells."""

    patient: str
    age: int
    department: str
    diagnoses: list[str]  # names in the order of the text
    drugs: list[str]
    all_drugs: set[str]
    all_diagnoses: set[str]


def told(text: str, names: list[str]) -> list[str]:
    return sorted((name for name in names if name in text), key=text.index)


def truth(text: str) -> Truth:
    """Find the one visit in RECORDS of which every word of ``text`` is true."""
    age = int(re.search(r"(\d+)(?:-year-old| years)", text)[1])  # type: ignore[index]
    sex = "female" if re.search(r"female|woman|girl", text) else "male"
    full = text.split(" Coded: ")[0]
    for name, _, letters, _ in DIAGNOSES.values():
        full = re.sub(rf"\b{letters}\b", name, full) if letters else full
    diagnoses = told(full, [name for name, *_ in DIAGNOSES.values()])
    drugs = told(full, [name for name, *_ in DRUGS.values()])
    assert diagnoses
    assert drugs
    found = []
    for who, (gender, born, visits) in RECORDS.items():
        everything = {DRUGS[code][0] for visit in visits for code in visit[4]}
        problems = {DIAGNOSES[code][0] for visit in visits for code in visit[3]}
        for kind, department, day, codes, orders in visits:
            years = int(day[:4]) - int(born[:4]) - (day[5:] < born[5:])
            facts = (
                years == age
                and gender == sex
                and department in text
                and SETTINGS[kind] in text
                and set(diagnoses) <= {DIAGNOSES[code][0] for code in codes}
                and set(drugs) <= {DRUGS[code][0] for code in orders}
                and all(f"{n} {d}".strip() in text for n, _, d in DRUGS.values() if n in drugs)
            )
            if facts:
                found.append(Truth(who, age, department, diagnoses, drugs, everything, problems))
    assert len(found) == 1, text
    return found[0]


def answer_is_true(row: Row, answer: str, fact: Truth) -> bool:
    """Judge ``answer`` from the record alone."""
    task, question = row["task_type"], row["instruction"]
    if task == "question answering":
        if "How old" in question:
            return answer == f"The patient is {fact.age} years old."
        if "How many" in question:
            return answer == f"The number of medications listed is {len(fact.drugs)}."
        if "department" in question:
            return answer == f"The patient was seen by {fact.department}."
        name = re.search(r"dose of (.+)\?", question)[1]  # type: ignore[index]
        dose = next(dose for drug, _, dose in DRUGS.values() if drug == name)
        return name in fact.drugs and answer == f"The dose of {name} is {dose}."
    if task == "named entity recognition":
        kind = "medications" if "all medications" in question else "diagnoses"
        try:
            return bool(
                json.loads(answer)
                == {kind: fact.drugs if kind == "medications" else fact.diagnoses}
            )
        except json.JSONDecodeError:
            return False
    if task == "classification":
        first = fact.diagnoses[0]
        chapter = next(chapter for name, chapter, *_ in DIAGNOSES.values() if name == first)
        assert f" {chapter}" in question.split("Choose one:")[1]
        return answer == f"{first}: {chapter} chapter."
    if task == "summarization":
        names = [name for name, *_ in (*DIAGNOSES.values(), *DRUGS.values())]
        return answer.startswith(f"{fact.age}-year-old") and set(told(answer, names)) == {
            *fact.diagnoses,
            *fact.drugs,
        }
    if task == "error detection and correction":
        name, code = re.search(r"Coded: (.+) = (\S+)\.$", row["input"]).groups()  # type: ignore[union-attr]
        right = next(code for code, (known, *_) in DIAGNOSES.items() if known == name)
        assert name in fact.diagnoses
        if right == code:
            return answer == f"No error: {name} is coded {right}."
        return answer == f"Error: {name} should be coded {right}, not {code}."
    if task == "textual entailment":
        name = re.search(r"(?:treated with|the diagnosis) (.+)\.$", question)[1]  # type: ignore[index]
        if name in (*fact.drugs, *fact.diagnoses):
            return answer == f"Yes, the text names {name}."
        assert name not in fact.all_drugs | fact.all_diagnoses
        return answer == f"No, the text does not name {name}."
    if task == "multiple-choice question answering":
        options = dict(re.findall(r"([A-D])\) (\w+)", question))
        assert len(set(options.values())) == 4
        assert len(fact.all_drugs & set(options.values())) == 1
        letter, name = re.fullmatch(r"The answer is ([A-D])\) (\w+)\.", answer).groups()  # type: ignore[union-attr]
        assert options[letter] == name
        return name in fact.drugs
    assert task == "abbreviation expansion"
    known = {short: full for name, _, short, full in DIAGNOSES.values() if name in fact.diagnoses}
    known.pop("", None)
    pairs = dict(part.split(" stands for ") for part in answer.removesuffix(".").split("; "))
    assert all(short in row["input"] for short in pairs)
    return pairs == known


def test_chosen_answers_are_true_and_rejected_ones_false(rows: dict[str, list[Row]]) -> None:
    for row in (row for part in rows.values() for row in part):
        fact = truth(row["input"])
        assert answer_is_true(row, row["output"], fact), row
        if row["rejected_output"]:
            assert not answer_is_true(row, row["rejected_output"], fact), row


def test_columns_types_and_splits(rows: dict[str, list[Row]]) -> None:
    sizes = {name: len(part) for name, part in rows.items()}
    assert sizes == {"sft": 320, "dpo": 320, "held_out": 48}
    for name, part in rows.items():
        for row in part:
            assert list(row) == COLUMNS
            assert all(isinstance(row[column], str) for column in COLUMNS[:9])
            assert all(isinstance(row[column], float) for column in COLUMNS[9:])
            assert bool(row["rejected_output"]) == bool(row["error_type"]) == (name != "sft")
            assert row["output_format"] in ("plain_text", "json")
            if row["output_format"] == "json":
                json.loads(row["output"])
            if row["error_type"] == "invalid json":
                with pytest.raises(json.JSONDecodeError):
                    json.loads(row["rejected_output"])


def test_every_kind_of_flaw_occurs(rows: dict[str, list[Row]]) -> None:
    assert {row["error_type"] for row in rows["dpo"]} == {
        *("wrong age", "wrong count", "wrong department", "wrong dose"),
        *("wrong medication", "wrong diagnosis", "omitted medication", "omitted diagnosis"),
        *("invalid json", "wrong class", "wrong verdict", "wrong choice", "wrong expansion"),
        *("invented error", "missed error", "wrong diagnosis code"),
    }


def test_all_task_types_in_equal_parts(rows: dict[str, list[Row]]) -> None:
    for part in rows.values():
        assert set(Counter(row["task_type"] for row in part).values()) == {len(part) // len(TASKS)}


def test_texts_and_answers_have_the_promised_length(rows: dict[str, list[Row]]) -> None:
    def pieces(text: str) -> int:  # words and marks: close to, and at most, the number of tokens
        return len(re.findall(r"\w+|[^\w\s]", text))

    for row in (row for part in rows.values() for row in part):
        assert 20 <= pieces(row["input"]) <= 100
        assert 5 <= pieces(row["output"]) <= 60


def test_no_patient_text_or_row_is_in_two_places(rows: dict[str, list[Row]]) -> None:
    train = rows["sft"] + rows["dpo"]
    assert len({(row["instruction"], row["input"]) for row in train}) == len(train)
    patients = {truth(row["input"]).patient for row in train}
    apart = {truth(row["input"]).patient for row in rows["held_out"]}
    assert apart
    assert not patients & apart
    assert not {row["input"] for row in train} & {row["input"] for row in rows["held_out"]}


def test_same_export_and_seed_give_the_same_bytes(export: Path, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> list[bytes]:
        files = write_instructions(export, tmp_path / name, 24, 8, seed)
        return [files.sft.read_bytes(), files.dpo.read_bytes(), files.held_out.read_bytes()]

    assert made("one", 5) == made("two", 5)
    assert made("three", 6) != made("one", 5)


def test_held_out_patients_depend_on_the_seed_only(export: Path) -> None:
    visits = read_visits(export)
    assert split(visits, 1) == split(list(reversed(visits)), 1)
    assert len(split(visits, 1)) == 2
    assert len({split(visits, seed) for seed in range(8)}) > 1


def test_too_few_records_is_one_clear_line(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 patients give \d+ different instructions, 9000 are"):
        write_instructions(export, tmp_path, 8, 9000, seed=1)


def test_visits_hold_what_the_records_say_and_nothing_unusable(export: Path) -> None:
    visits = read_visits(export)
    assert len(visits) == sum(len(visits) for _, _, visits in RECORDS.values())
    first = visits[0]
    assert (first.patient, first.age, first.sex) == ("a", 73, "female")  # birthday is tomorrow
    assert [d.code for d in first.diagnoses] == ["I10", "E78.5"]
    assert [(m.name, m.dose) for m in first.medications] == [
        ("Amlodipine", "5 mg"),
        ("Atorvastatin", "10 mg"),
    ]
    names = {m.name for visit in visits for m in visit.medications}
    assert not names & {"NS", "Broad spectrum antibiotic"}
    range_dose = next(m for v in visits for m in v.medications if m.name == "Lisinopril")
    assert range_dose.dose == ""
    # The whole record counts for what is false of a patient: also what another visit ordered.
    assert first.drugs >= {"acetaminophen", "161", "ns", "broad spectrum antibiotic"}
    assert "K81" in first.categories
