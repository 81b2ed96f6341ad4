"""How different hospitals are: distributions of diagnoses, note types and services in an export."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# First category of each ICD-10-CM chapter (FY 2026 tabular list), in order, with a plain name.
_CHAPTERS = (
    ("A00", "infectious"),
    ("C00", "neoplasm"),
    ("D50", "blood"),
    ("E00", "endocrine or metabolic"),
    ("F01", "mental"),
    ("G00", "nervous system"),
    ("H00", "eye"),
    ("H60", "ear"),
    ("I00", "circulatory"),
    ("J00", "respiratory"),
    ("K00", "digestive"),
    ("L00", "skin"),
    ("M00", "musculoskeletal"),
    ("N00", "genitourinary"),
    ("O00", "pregnancy"),
    ("P00", "perinatal"),
    ("Q00", "congenital"),
    ("R00", "symptom or sign"),
    ("S00", "injury"),
    ("U00", "special purpose"),
    ("V00", "external cause"),
    ("Z00", "health status"),
)
_STARTS = tuple(start for start, _ in _CHAPTERS)
_FORM = re.compile(r"[A-Z]\d[0-9A-Z](\.[0-9A-Z]{1,4})?")


def chapter(code: str) -> str:
    """Plain name of the ICD-10-CM chapter of ``code`` ("I10" is "circulatory").

    Raises
    ------
    ValueError
        ``code`` does not have the form of an ICD-10-CM code.
    """
    if not is_icd10(code):
        raise ValueError(f"{code!r} is not an ICD-10-CM code")
    return _CHAPTERS[bisect_right(_STARTS, code[:3]) - 1][1]


def is_icd10(code: str) -> bool:
    """True if ``code`` has the form of an ICD-10-CM code; clinosim at times writes another name."""
    return _FORM.fullmatch(code) is not None


@dataclass(frozen=True)
class CaseMix:
    """Counts: conditions by ICD-10-CM chapter, notes by LOINC type, encounters by service."""

    chapters: Counter[str]
    note_types: Counter[str]
    services: Counter[str]


def resources(export: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The resources of one type in a bulk export, in the order of its file."""
    with (export / f"{kind}.ndjson").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def case_mix(export: Path) -> CaseMix:
    """Count what an export's hospital treats and writes; conditions without a code are left out."""
    codes = (item["code"]["coding"][0]["code"] for item in resources(export, "Condition"))
    notes = [*resources(export, "DocumentReference"), *resources(export, "Composition")]
    encounters = resources(export, "Encounter")
    return CaseMix(
        chapters=Counter(chapter(code) for code in codes if is_icd10(code)),
        note_types=Counter(item["type"]["coding"][0]["display"] for item in notes),
        services=Counter(item.get("serviceType", {}).get("text", "none") for item in encounters),
    )


def distance(one: Counter[str], other: Counter[str]) -> float:
    """Jensen-Shannon distance of two count tables: 0 for equal proportions, 1 for disjoint support.

    The square root of the Jensen-Shannon divergence in bits (Endres and Schindelin 2003), a metric.
    """
    kinds = sorted(one.keys() | other.keys())
    p, q = (np.array([counts[kind] for kind in kinds], float) for counts in (one, other))
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    bits = sum(float(np.sum(x[x > 0] * np.log2(x[x > 0] / middle[x > 0]))) for x in (p, q)) / 2
    return math.sqrt(max(bits, 0.0))  # rounding can leave a hair below zero
