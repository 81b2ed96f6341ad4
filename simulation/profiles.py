"""Case mixes of the simulated hospitals, as clinosim command lines.

clinosim has no option for a case mix: its demographics are fixed and ``--hospital-config`` moves
patients between departments but leaves their diseases unchanged. What its command line can do is
simulate a catchment (``simulate``) and any number of patients with a named disease
(``test-disease``) or emergency (``test-encounter``). A hospital is therefore general care for a
share of its catchment, plus the patients who come to it for what it is known for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

# clinosim admits the patients it is asked for by disease on a day of June 2024.
START, END = "2024-01-01", "2024-12-31"


@dataclass(frozen=True)
class Profile:
    """What one hospital treats; rates are patients per 100 inhabitants of its catchment.

    Parameters
    ----------
    operations
        Departments, wards and staff: one of the YAML files in clinosim's ``config`` folder.
    general
        Share of the catchment simulated for general care, 0 to 1 (0 simulates none).
    admissions
        Inpatients by clinosim disease, as ``clinosim list-diseases`` names them.
    visits
        Emergency and outpatient visitors by clinosim encounter condition.
    """

    name: str
    about: str
    operations: str = "hospital_operations.yaml"
    general: float = 1.0
    admissions: Mapping[str, int] = field(default_factory=dict)
    visits: Mapping[str, int] = field(default_factory=dict)


PROFILES = (
    Profile(
        "north",
        "community hospital: primary care, infections",
        admissions={"urinary_tract_infection": 2, "cellulitis": 2, "sepsis": 1},
    ),
    Profile(
        "harbor",
        "heart and stroke centre",
        operations="hospital_large.yaml",
        general=0.3,
        admissions={
            "heart_failure_exacerbation": 6,
            "acute_mi": 6,
            "atrial_fibrillation_rvr": 5,
            "cerebral_infarction": 3,
        },
        visits={"syncope": 3, "cardiac_rehabilitation": 5},
    ),
    Profile(
        "valley",
        "rural clinic: emergencies and minor injuries",
        operations="hospital_small.yaml",
        general=0.4,
        visits={
            "minor_laceration": 5,
            "ankle_sprain": 5,
            "animal_bite": 4,
            "elderly_fall": 4,
            "wrist_fracture": 4,
            "viral_gastroenteritis": 4,
            "wound_care_followup": 4,
            "asthma_attack_mild": 3,
        },
    ),
    Profile(
        "summit",
        "trauma and orthopaedic centre",
        operations="hospital_large.yaml",
        general=0.3,
        admissions={
            "hip_fracture": 5,
            "vertebral_compression_fracture": 4,
            "wrist_fracture_surgical": 4,
            "traffic_accident_severe": 2,
        },
        visits={"rehabilitation_outpatient": 4},
    ),
    Profile(
        "meadow",
        "digestive and general surgery",
        operations="hospital_large.yaml",
        general=0.3,
        admissions={
            "acute_appendicitis": 5,
            "acute_cholecystitis": 4,
            "gi_bleeding": 4,
            "acute_pancreatitis": 3,
        },
        visits={"upper_endoscopy_diagnostic": 4},
    ),
)

PUBLIC = Profile(
    "public",
    "patients of no hospital, for the instruction set",
    general=1.0,
    admissions={
        "bacterial_pneumonia": 5,
        "deep_vein_thrombosis": 5,
        "heart_failure_exacerbation": 5,
        "acute_cholecystitis": 5,
        "hip_fracture": 5,
    },
    visits={"renal_colic": 5, "migraine": 5, "low_back_pain": 5, "uti_uncomplicated": 5},
)


def profile(index: int) -> Profile:
    """The profile of hospital ``index`` (from 0); beyond the table, names get a number."""
    turn, place = divmod(index, len(PROFILES))
    found = PROFILES[place]
    return found if turn == 0 else replace(found, name=f"{found.name}{turn + 1}")


def seed_of(seed: int, name: str) -> int:
    """A clinosim seed of its own (31 bits) for every ``name`` of a run with ``seed``."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def commands(profile: Profile, population: int, seed: int, config: Path) -> list[list[str]]:
    """The clinosim command lines, without ``-o``, that together make the hospital's patients.

    Parameters
    ----------
    population
        Inhabitants of the catchment.
    config
        Folder of clinosim's hospital configurations.
    """
    own = seed_of(seed, profile.name)
    common = ["--country", "US", "--format", "fhir-r4"]
    lines: list[list[str]] = []
    if profile.general:
        lines.append(["simulate", "-p", str(_share(population, profile.general)), "-s", str(own)])
        lines[0] += [*common, "--start", START, "--end", END]
        lines[0] += ["--hospital-config", str(config / profile.operations)]
    for command, rates in (
        ("test-disease", profile.admissions),
        ("test-encounter", profile.visits),
    ):
        for what, rate in rates.items():
            patients = _share(population, rate / 100)
            # Every cohort has a seed of its own, or their first patients would be twins.
            lines.append([command, what, "-n", str(patients), "-s", str(own + len(lines)), *common])
    return lines


def _share(population: int, share: float) -> int:
    return max(1, round(population * share))
