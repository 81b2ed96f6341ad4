"""A site's notes as privacy units, on either side of the split into training and held-out."""

from __future__ import annotations

from dataclasses import dataclass

from client.notes.load import NotesError, load_notes
from client.notes.note import Units
from client.notes.split import split_units
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy


@dataclass(frozen=True)
class SiteUnits:
    """Units on both sides of the split, and whether the notes have patient ids."""

    train: Units
    held_out: Units
    has_patients: bool


def site_units(policy: SitePolicy, unit: str) -> SiteUnits:
    """Units this site trains on, and its held-out ones.

    The split is by patient whatever the privacy unit ("patient" or "note"), so that no patient is
    on both sides. Raises Refusal when the notes cannot be read.
    """
    try:
        notes = load_notes(policy.notes)
    except NotesError as problem:
        raise Refusal(Reason.NOTES_UNUSABLE, str(problem)) from None
    train, held_out = split_units(notes.units(), policy.notes.holdout)
    if unit == "note":
        train, held_out = _by_note(train), _by_note(held_out)
    return SiteUnits(train, held_out, notes.has_patients)


def _by_note(units: Units) -> Units:
    return {f"{u}\n{note.note_id}": (note,) for u, own in units.items() for note in own}
