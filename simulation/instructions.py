"""A small instruction set in MediFlow's schema, true by construction, from structured records.

Three files: ``mediflow.jsonl`` for SFT, ``mediflow_dpo.jsonl`` for DPO, where ``rejected_output``
has the one flaw that ``error_type`` names, and ``held_out.jsonl``, rows like DPO's on other
patients. Promises: every answer follows from the patient's record (``simulation.tasks``); no
patient, and no text, is both in ``held_out.jsonl`` and in a training file; the same export and seed
give the same bytes.

The columns are MediFlow's (card of microsoft/mediflow). Its five scores come from a language model
as judge; none judged these rows, so they carry constants: full marks (4.0) where construction
guarantees them, 2.0 for the realism of templates, and the level for difficulty.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from simulation.cases import Vocabulary, compose, vocabulary
from simulation.tasks import TASKS, Exchange
from simulation.visits import Visit, read_visits

_HELD_OUT_PATIENTS = 0.2
_FRUITLESS = 1000  # draws without a new row, after which the records count as used up
_LEVELS = {"moderate": 1.0, "moderate-hard": 2.0, "hard": 3.0, "very hard": 4.0}
_NOTE_KINDS = {
    "outpatient": "clinical note",
    "emergency": "emergency department note",
    "inpatient": "admission note",
}


@dataclass(frozen=True)
class InstructionFiles:
    """Where the three files are."""

    sft: Path
    dpo: Path
    held_out: Path


def write_instructions(
    export: Path, out: Path, examples: int, held_out: int, seed: int
) -> InstructionFiles:
    """Make the instruction set of a FHIR export.

    Parameters
    ----------
    export
        Bulk export of patients who are at none of the federation's hospitals.
    out
        Folder of the files; made if absent, files in it are replaced.
    examples
        Rows for SFT, and as many for DPO.
    held_out
        Rows on the fifth of the patients that is kept apart.

    Raises
    ------
    ValueError
        The records have too few different facts for so many rows.
    """
    visits = read_visits(export)
    words = vocabulary(visits)
    apart = split(visits, seed)
    train = [visit for visit in visits if visit.patient not in apart]
    test = [visit for visit in visits if visit.patient in apart]
    rows = _draw(train, words, 2 * examples, Random(f"{seed}/train"), export)
    texts = {row["input"] for row in rows}
    unseen = _draw(test, words, held_out, Random(f"{seed}/held out"), export, texts)
    plain = [{**row, "rejected_output": "", "error_type": ""} for row in rows[:examples]]
    out.mkdir(parents=True, exist_ok=True)
    return InstructionFiles(
        sft=_write(out / "mediflow.jsonl", plain),
        dpo=_write(out / "mediflow_dpo.jsonl", rows[examples:]),
        held_out=_write(out / "held_out.jsonl", unseen),
    )


def split(visits: Sequence[Visit], seed: int) -> frozenset[str]:
    """The patients to hold out: a fifth, at least one."""
    patients = sorted({visit.patient for visit in visits})
    Random(f"{seed}/split").shuffle(patients)
    return frozenset(patients[: max(1, round(_HELD_OUT_PATIENTS * len(patients)))])


def _draw(
    visits: Sequence[Visit],
    words: Vocabulary,
    count: int,
    rng: Random,
    export: Path,
    taken: Collection[str] = (),
) -> list[dict[str, Any]]:
    """``count`` different rows, the task types in turn, on no text in ``taken``."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    makers = list(TASKS.items())
    fruitless = 0
    while visits and len(rows) < count and fruitless < _FRUITLESS:
        fruitless += 1
        task, make = makers[len(rows) % len(makers)]
        case = compose(rng.choice(visits), rng)
        exchange = make(case, words, rng)
        if exchange is None or exchange.input in taken:
            continue
        key = (exchange.instruction, exchange.input)
        if key not in rows:
            rows[key] = _row(task, case.visit, exchange)
            fruitless = 0
    if len(rows) < count:
        patients = len({visit.patient for visit in visits})
        raise ValueError(
            f"{export}: {patients} patients give {len(rows)} different instructions, {count} are "
            "wanted; ask for fewer (alignment.examples, alignment.held_out) or simulate more people"
        )
    return list(rows.values())


def _row(task: str, visit: Visit, exchange: Exchange) -> dict[str, Any]:
    return {
        "instruction": exchange.instruction,
        "input": exchange.input,
        "output": exchange.output,
        "task_type": task,
        "input_data": _NOTE_KINDS[visit.setting],
        "output_format": exchange.output_format,
        "difficulty_level": exchange.difficulty,
        "rejected_output": exchange.rejected,
        "error_type": exchange.error,
        "quality": 4.0,
        "alignment": 4.0,
        "coherence": 4.0,
        "realism": 2.0,
        "difficulty": _LEVELS[exchange.difficulty],
    }


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path
