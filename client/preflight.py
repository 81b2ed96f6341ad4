"""What would have every round refused, found while a person is looking.

Otherwise the coordinator would be the first to know that a hospital's notes, model or ledger cannot
be used.
"""

from __future__ import annotations

import os
from pathlib import Path

from adapters.base_model import ModelError, skeleton
from client.notes.load import NotesError, checked_path, load_notes
from client.notes.note import NoteSet
from client.privacy.ledger import Ledger, LedgerError, begun
from client.privacy.unprotected import unprotected_mark
from client.refusal import failure_site
from client.site import SiteError, read_policy
from conf.policy import SitePolicy


def preflight(file: Path) -> tuple[SitePolicy, str]:
    """The policy in ``file``, once rounds can be begun under it, and what notes were found.

    The line about the notes is for this site's terminal only. The notes are read as a round reads
    them, and no ledger is begun. Raises SiteError: one line that says what in the policy cannot be.
    """
    policy = read_policy(file)
    try:
        checked_path(policy.notes)
        skeleton(policy.model)
        _require_units(policy)
        _require_ledger(policy)
        notes = _read(policy)
    except (NotesError, ModelError, LedgerError) as problem:
        raise SiteError(f"{file}: {problem}") from None
    except OSError as problem:
        raise SiteError(f"{file}: {problem.filename}: {problem.strerror}") from None
    return policy, _found(notes)


def _read(policy: SitePolicy) -> NoteSet:
    """The notes. What is not foreseen may quote one, so only where it happened is told."""
    try:
        return load_notes(policy.notes)
    except (NotesError, OSError):
        raise
    except Exception as problem:
        raise NotesError(f"the notes cannot be read ({failure_site(problem)})") from None


def _found(notes: NoteSet) -> str:
    found = f"{len(notes.notes)} notes"
    if notes.has_patients:
        found += f" of {len(notes.units())} patients"
    unused = ", ".join(f"{count} {reason}" for reason, count in notes.counts().most_common())
    return f"{found}; not used: {unused or 'none'}"


def _require_units(policy: SitePolicy) -> None:
    limits = policy.privacy
    if limits.required and limits.unit == "patient" and not policy.notes.names_patients:
        raise NotesError(
            "notes.patient_field=null: name the field of the patient's id, or allow the weaker "
            "privacy.unit: note"
        )


def _require_ledger(policy: SitePolicy) -> None:
    """One that was begun verifies; where there is none, one can be begun."""
    mark = unprotected_mark(policy)
    if policy.privacy.required and mark.exists():
        raise LedgerError(f"privacy.required=true: {mark} says that notes left without privacy")
    if begun(policy.ledger, policy.site_key, policy.anchor):
        with Ledger.of(policy) as ledger:
            ledger.entries()
        return
    for key in ("ledger", "site_key", "anchor"):
        if (path := getattr(policy, key)) is None:
            continue
        folder = path.absolute().parent
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise LedgerError(f"{key}={path}: this account may not write in {there}")
