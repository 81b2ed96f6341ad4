"""Data is trained on with privacy or without, never both: a statement covers all that left.

A policy may allow training without privacy (``privacy.required: false``), for simulated or public
text. What leaves then is in no ledger. So a ledger that exists forbids it, and it leaves a mark
beside the place of the ledger that forbids to begin one there. Looking and beginning are one step
under a lock, so of processes at once the first decides; a mark is never taken away again.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from client.privacy import durable
from client.privacy.ledger import Ledger, begun
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy

_WHY = (
    b"Notes of this site were trained on without privacy. No ledger can be begun here: its "
    b"statement would be untrue.\n"
)


def mark_unprotected(policy: SitePolicy) -> None:
    """Put down, durably, that something leaves without privacy. Raises Refusal by a ledger."""
    mark = unprotected_mark(policy)
    with _choosing(policy):
        if begun(policy.ledger, policy.site_key, policy.anchor):  # also where it has vanished
            raise Refusal(Reason.LINEAGE_PRIVATE, f"{policy.ledger} was begun")
        if not mark.exists():
            durable.replace(mark, _WHY)


def open_protected(policy: SitePolicy) -> Ledger:
    """The site's ledger, begun where there is none. Raises Refusal by a mark, and LedgerError."""
    with _choosing(policy):
        mark = unprotected_mark(policy)
        if mark.exists():
            raise Refusal(Reason.LINEAGE_UNPROTECTED, f"{mark} exists")
        return Ledger.of(policy)


def unprotected_mark(policy: SitePolicy) -> Path:
    """The file that is there once something has left without privacy."""
    return policy.ledger.with_name(policy.ledger.name + ".unprotected")


def _choosing(policy: SitePolicy) -> FileLock:
    mark = unprotected_mark(policy)
    mark.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(mark.with_name(mark.name + ".lock"))
