"""Eight MediFlow task types whose answers follow from a patient's record.

Each maker takes a ``Case`` (a visit, and the part of it that a short text tells) and returns an
``Exchange``: what is asked, the true answer, and an answer with one named flaw. Truth is by
construction: answers are assembled from the same record as the text, never read out of it. What a
flawed answer adds (a drug, a diagnosis, a code) is absent from the patient's *whole* record.

The task names are MediFlow's in plain lower case; the literal spelling in its ``task_type`` column
is not published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from simulation.case_mix import chapter
from simulation.cases import Case, Vocabulary, listed, sex_noun

PLAIN, JSON = "plain_text", "json"

# ICD-10-CM code: the usual abbreviation, and what it stands for.
ABBREVIATIONS = {
    "E11.9": ("T2DM", "type 2 diabetes mellitus"),
    "E78.5": ("HLD", "hyperlipidemia"),
    "F32.9": ("MDD", "major depressive disorder"),
    "F41.1": ("GAD", "generalized anxiety disorder"),
    "I10": ("HTN", "hypertension"),
    "I21.9": ("AMI", "acute myocardial infarction"),
    "I25.10": ("CAD", "coronary artery disease"),
    "I48.91": ("AF", "atrial fibrillation"),
    "I50.9": ("HF", "heart failure"),
    "J44.9": ("COPD", "chronic obstructive pulmonary disease"),
    "K21.9": ("GERD", "gastroesophageal reflux disease"),
    "M17.9": ("OA", "osteoarthritis"),
    "N18.9": ("CKD", "chronic kidney disease"),
    "N39.0": ("UTI", "urinary tract infection"),
    "N40.0": ("BPH", "benign prostatic hyperplasia"),
}


@dataclass(frozen=True)
class Exchange:
    """A question on ``input``, its true answer, and a false one with the flaw ``error``."""

    instruction: str
    input: str
    output: str
    rejected: str
    error: str
    output_format: str = PLAIN
    difficulty: str = "moderate"


Maker = Callable[[Case, Vocabulary, Random], Exchange | None]


def question_answering(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """Age, number of medications, department or dose; the flaw is another value."""
    visit, medications = case.visit, case.medications
    dosed = [item for item in medications if item.dose]
    kind = rng.choice(["age", "count", "department", "dose" if dosed else "age"])
    if kind == "age":
        question = "How old is the patient?"
        form, right = "The patient is {} years old.", str(visit.age)
        wrong = str(
            visit.age + rng.choice([step for step in (-9, -4, 3, 8) if visit.age + step > 0])
        )
    elif kind == "count":
        question = "How many medications does the text list?"
        form = "The number of medications listed is {}."
        right, wrong = str(len(medications)), str(len(medications) + rng.choice([1, 2]))
    elif kind == "department":
        question = "Which department saw the patient?"
        form, right = "The patient was seen by {}.", visit.department
        others = [name for name in words.departments if name != right]
        if not others:
            return None
        wrong = rng.choice(others)
    else:
        item = rng.choice(dosed)
        question = f"What is the dose of {item.name}?"
        form, right = f"The dose of {item.name} is {{}}.", item.dose
        number, unit = right.split()
        wrong = f"{float(number) * rng.choice([2, 5, 10]):g} {unit}"
    return Exchange(
        f"Answer the question from the clinical text in one sentence. Question: {question}",
        case.text,
        form.format(right),
        form.format(wrong),
        f"wrong {kind}",
    )


def entity_recognition(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """Names as JSON; the flaw is a name too few, a name swapped, or JSON that does not parse."""
    kind, one = rng.choice([("medications", "medication"), ("diagnoses", "diagnosis")])
    names, foreign = _names(kind, case, words)
    flaw = rng.choice(["swap", "json", "omission" if len(names) > 1 else "swap"])
    right = json.dumps({kind: names})
    place = rng.randrange(len(names))
    if flaw == "json":
        wrong, error = right.removesuffix("]}"), "invalid json"
    elif flaw == "omission":
        wrong = json.dumps({kind: names[:place] + names[place + 1 :]})
        error = f"omitted {one}"
    elif foreign:
        wrong = json.dumps({kind: [*names[:place], rng.choice(foreign), *names[place + 1 :]]})
        error = f"wrong {one}"
    else:
        return None
    instruction = (
        f"Extract all {kind} named in the clinical text. "
        f'Answer with JSON only: {{"{kind}": [names in order of appearance]}}.'
    )
    return Exchange(instruction, case.text, right, wrong, error, JSON, "moderate-hard")


def classification(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """ICD-10-CM chapter of the first diagnosis; the flaw is another chapter."""
    first = case.diagnoses[0]
    right = chapter(first.code)
    others = sorted({chapter(item.code) for item in words.diagnoses} - {right})
    if not others:
        return None
    labels = sorted([right, *rng.sample(others, min(3, len(others)))])
    wrong = rng.choice([label for label in labels if label != right])
    instruction = (
        "Classify the first diagnosis of the clinical text by ICD-10-CM chapter. "
        f"Choose one: {'; '.join(labels)}. Name the diagnosis and the chapter."
    )
    return Exchange(
        instruction,
        case.text,
        f"{first.name}: {right} chapter.",
        f"{first.name}: {wrong} chapter.",
        "wrong class",
        PLAIN,
        "hard",
    )


def summarization(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """One line; the flaw is a wrong age, a missing diagnosis or a foreign medication."""
    visit = case.visit
    diagnoses, _ = _names("diagnoses", case, words)
    drugs, foreign = _names("medications", case, words)

    def line(age: int, diagnoses: list[str], drugs: list[str]) -> str:
        return f"{age}-year-old {sex_noun(visit)}: {'; '.join(diagnoses)}; on {listed(drugs)}."

    flaw = rng.choice(["age", "medication", "omission" if len(diagnoses) > 1 else "age"])
    if flaw == "age":
        wrong, error = line(visit.age + rng.choice([5, 10]), diagnoses, drugs), "wrong age"
    elif flaw == "omission":
        wrong, error = line(visit.age, diagnoses[:-1], drugs), "omitted diagnosis"
    elif foreign:
        wrong = line(visit.age, diagnoses, [*drugs[:-1], rng.choice(foreign)])
        error = "wrong medication"
    else:
        return None
    return Exchange(
        "Summarize the clinical text in one line: age, sex, every diagnosis, every medication.",
        case.text,
        line(visit.age, diagnoses, drugs),
        wrong,
        error,
    )


def error_correction(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """A code line that may be wrong; the flaw is a missed, invented or badly corrected error."""
    item = rng.choice(case.diagnoses)
    foreign = words.foreign_diagnoses(case)
    if len(foreign) < 2:
        return None
    other, third = rng.sample(foreign, 2)
    if rng.random() < 0.5:
        coded = item.code
        right = f"No error: {item.name} is coded {item.code}."
        wrong = f"Error: {item.name} should be coded {other.code}, not {item.code}."
        error = "invented error"
    else:
        coded = other.code
        right = f"Error: {item.name} should be coded {item.code}, not {other.code}."
        missed = f"No error: {item.name} is coded {other.code}."
        botched = f"Error: {item.name} should be coded {third.code}, not {other.code}."
        wrong, error = rng.choice([(missed, "missed error"), (botched, "wrong diagnosis code")])
    return Exchange(
        "Check the ICD-10-CM code at the end of the clinical text. "
        "State whether it is an error and give the right code.",
        f"{case.text} Coded: {item.name} = {coded}.",
        right,
        wrong,
        error,
        PLAIN,
        "very hard",
    )


def entailment(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """Whether the text supports a statement; the flaw is the opposite verdict."""
    kind = rng.choice(["medications", "diagnoses"])
    own, foreign = _names(kind, case, words)
    holds = rng.random() < 0.5 or not foreign
    name = rng.choice(own if holds else foreign)
    yes, no = f"Yes, the text names {name}.", f"No, the text does not name {name}."
    claim = "is treated with" if kind == "medications" else "has the diagnosis"
    return Exchange(
        "Does the clinical text support the statement? Answer yes or no with the reason. "
        f"Statement: the patient {claim} {name}.",
        case.text,
        yes if holds else no,
        no if holds else yes,
        "wrong verdict",
    )


def multiple_choice(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """Four drugs of which the patient takes one; the flaw is another choice."""
    own, foreign = _names("medications", case, words)
    if len(foreign) < 3:
        return None
    right = rng.choice(own)
    options = [right, *rng.sample(foreign, 3)]
    rng.shuffle(options)
    choices = [f"{letter}) {name}" for letter, name in zip("ABCD", options, strict=True)]
    place = options.index(right)
    wrong = rng.choice([choice for choice in choices if choice != choices[place]])
    return Exchange(
        "Choose the right answer from the clinical text. Which medication does the patient take? "
        + " ".join(choices),
        case.text,
        f"The answer is {choices[place]}.",
        f"The answer is {wrong}.",
        "wrong choice",
    )


def abbreviation_expansion(case: Case, words: Vocabulary, rng: Random) -> Exchange | None:
    """Diagnoses written short; the flaw is one wrong expansion."""
    text = case.text
    right = []
    for item in case.diagnoses:
        if item.code in ABBREVIATIONS:
            right.append(ABBREVIATIONS[item.code])
            text = text.replace(item.name, right[-1][0])
    if not right:
        return None
    place = rng.randrange(len(right))
    letters, meaning = right[place]
    other = rng.choice(sorted({full for _, full in ABBREVIATIONS.values()} - {meaning}))
    wrong = [*right[:place], (letters, other), *right[place + 1 :]]
    return Exchange(
        "Expand every abbreviated diagnosis in the clinical text. State what each stands for.",
        text,
        "; ".join(" stands for ".join(pair) for pair in right) + ".",
        "; ".join(" stands for ".join(pair) for pair in wrong) + ".",
        "wrong expansion",
    )


TASKS: dict[str, Maker] = {
    "question answering": question_answering,
    "named entity recognition": entity_recognition,
    "classification": classification,
    "summarization": summarization,
    "error detection and correction": error_correction,
    "textual entailment": entailment,
    "multiple-choice question answering": multiple_choice,
    "abbreviation expansion": abbreviation_expansion,
}


def _names(kind: str, case: Case, words: Vocabulary) -> tuple[list[str], list[str]]:
    """The names that the text tells, and names foreign to the patient."""
    if kind == "medications":
        own, foreign = [m.name for m in case.medications], words.foreign_medications(case)
        return own, [m.name for m in foreign]
    return [d.name for d in case.diagnoses], [d.name for d in words.foreign_diagnoses(case)]
