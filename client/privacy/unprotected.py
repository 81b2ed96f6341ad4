"""Data is trained on with privacy or without, never both: a statement covers all that left.

A policy may allow training without privacy (``privacy.required: false``), for simulated or public
text. What leaves then is in no ledger. So a ledger that exists forbids it, and it leaves a mark
beside the place of the ledger that forbids to begin one there. Of two processes at once, each puts
down its own file before it looks for the other's, so at least one of them stops.
"""

from __future__ import annotations

from pathlib import Path

from client.privacy import durable
from client.refusal import Reason, Refusal
from conf.policy import SitePolicy

_WHY = (
    b"Notes of this site were trained on without privacy. No ledger can be begun here: its "
    b"statement would be untrue.\n"
)


def mark_unprotected(policy: SitePolicy) -> None:
    """Put down, durably, that something leaves without privacy. Raises Refusal by a ledger."""
    mark = _mark(policy)
    new = not mark.exists()
    if new:
        durable.replace(mark, _WHY)
    if policy.ledger.exists():
        if new:
            mark.unlink()  # nothing has left
        raise Refusal(Reason.LINEAGE_PRIVATE, f"{policy.ledger} exists")


def require_protected(policy: SitePolicy) -> None:
    """Return when nothing has left without privacy. Raises Refusal."""
    if _mark(policy).exists():
        raise Refusal(Reason.LINEAGE_UNPROTECTED, f"{_mark(policy)} exists")


def _mark(policy: SitePolicy) -> Path:
    return policy.ledger.with_name(policy.ledger.name + ".unprotected")
