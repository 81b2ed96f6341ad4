"""Hospitals made of real notes: one for each of the largest departments of the MTSamples.

The notes are read where the benchmark runs; none of them is part of the project or of its results.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from client.notes.load import load_notes
from client.notes.note import Units
from client.notes.split import split_units
from conf.schema import NotesSettings

NOTES = Path(__file__).parents[2].parent / "shared/data/mtsamples/mtsamples.jsonl"
_HOLDOUT = 0.2


@dataclass(frozen=True)
class Scored:
    """A held-out note: its first tokens, and how many characters they cover."""

    ids: list[int]
    chars: int


@dataclass(frozen=True)
class Department:
    """A hospital: units to train on (token rows of their notes), and held-out notes."""

    name: str
    units: dict[str, list[list[int]]]
    held_out: list[Scored]


def departments(
    tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int, held_out: int
) -> list[Department]:
    """The ``count`` largest departments, each with at most ``held_out`` notes to be scored."""
    wanted = NotesSettings(source="jsonl", path=NOTES, hospital_field="department")
    by_name: dict[str, Units] = defaultdict(dict)
    for note in load_notes(wanted).notes:
        by_name[note.hospital or ""][note.unit] = (note,)
    largest = sorted(by_name, key=lambda name: (-len(by_name[name]), name))[:count]

    def window(text: str) -> Scored:
        coded = tokenizer(text, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
        return Scored(coded.input_ids, coded.offset_mapping[-1][1] - coded.offset_mapping[0][1])

    found = []
    for name in largest:
        train, kept = split_units(by_name[name], _HOLDOUT)
        units = {unit: [window(note.text).ids for note in notes] for unit, notes in train.items()}
        scored = [window(note.text) for notes in kept.values() for note in notes]
        found.append(Department(name, units, scored[:held_out]))
    return found
