"""Held-out notes of every hospital, scored under base, local, merged and aligned adapters.

Only a simulation can do this in one place: in a real run each hospital's held-out notes, and scores
on them, stay there unless its policy releases them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from adapters import lora
from adapters.adapter import Adapter
from adapters.base_model import BaseModel
from adapters.scoring import TextScore, score_texts
from client.notes.load import load_notes
from client.notes.note import Note
from client.notes.split import split_units
from simulation.sites import Site


def held_out_texts(site: Site, most: int) -> dict[str, list[str]]:
    """Held-out texts by hospital: one note of each of up to ``most`` patients."""
    found = load_notes(site.policy.notes)
    _, held_out = split_units(found.units(), site.policy.notes.holdout)
    by_hospital: dict[str, list[Note]] = {name: [] for name in site.stands_for}
    for notes in held_out.values():
        own = by_hospital[notes[0].hospital or site.name]
        if len(own) < most:
            own.append(notes[len(notes) // 2])
    return {name: [note.text for note in notes] for name, notes in by_hospital.items()}


def score(
    base: BaseModel, adapter: Adapter | None, texts: Sequence[str], max_tokens: int
) -> TextScore:
    """Score of the texts under base plus adapter (None: the base alone)."""
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(lora.applied(base.model, adapter))
        return score_texts(base.model, base.tokenizer, texts, max_tokens)


def as_record(scores: dict[str, TextScore]) -> dict[str, dict[str, Any]]:
    """``{"perplexity": {stage: value}, "bits_per_char": {stage: value}}`` for the summary."""
    return {
        "perplexity": {stage: round(s.perplexity, 6) for stage, s in scores.items()},
        "bits_per_char": {stage: round(s.bits_per_char, 6) for stage, s in scores.items()},
    }
