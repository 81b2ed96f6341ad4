"""What a site has spent, as a signed statement that an ethics board can check by itself.

The statement holds every mechanism that was charged, so epsilon can be computed again with any
accountant, and nothing about a patient: no note, no count, no path. It is signed with the site's
Ed25519 key over its canonical JSON (sorted keys, no spaces, ASCII); checking needs the public key
only, which the board should have from the hospital by another way than the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.privacy import accountant
from client.privacy.accountant import GaussianSteps, epsilon, epsilon_rdp
from client.privacy.chain import Entry, LedgerError
from client.privacy.ledger import ADJACENCY, MECHANISM, Ledger, charged, reservations

FORMAT = "wardround privacy statement 1"
_SHOWN = (
    "seq", "at", "run", "round", "unit", "mechanisms", "max_notes_per_unit", "clip_norm",
    "denominator", "steps_planned", "randomness", "released", "share", "base_model", "plan", "code",
    "accountant",
)  # fmt: skip
_NUMERICS = 0.02  # relative difference of epsilon that is put down to another version's numerics


@dataclass(frozen=True)
class Checked:
    """A statement whose signature holds, and epsilon as computed again from its mechanisms."""

    statement: dict[str, Any]
    public_key: str  # hex
    epsilon: float


def make(ledger: Ledger, site: str) -> dict[str, Any]:
    """The signed statement on the ledger's lineage; JSON. Raises LedgerError."""
    entries = ledger.entries()
    history = charged(entries, ledger.lineage)
    statement = {
        "format": FORMAT,
        "site": site,
        "lineage": ledger.lineage,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "adjacency": ADJACENCY,
        "mechanism": MECHANISM,
        "accountant": accountant.NAME,
        "delta": ledger.delta,
        "epsilon": epsilon(history, ledger.delta),
        "epsilon_rdp": epsilon_rdp(history, ledger.delta),
        "epsilon_allowed": ledger.budget,
        "ledger": {"entries": len(entries), "head": entries[-1].hash if entries else None},
        "reservations": _reservations(entries, ledger.lineage),
    }
    signature = ledger.key.sign(_canonical(statement)).hex()
    return {
        "statement": statement,
        "public_key": ledger.key.public.hex(),
        "signature": signature,
    }


def check(content: str) -> Checked:
    """Check a statement from its text alone, without anything of the site's.

    Raises LedgerError when the text is no statement, its signature does not hold, or its epsilon is
    less than what its mechanisms cost (by more than 2 %).
    """
    try:
        held = json.loads(content)
        statement, key = held["statement"], bytes.fromhex(held["public_key"])
        public, signature = (
            Ed25519PublicKey.from_public_bytes(key),
            bytes.fromhex(held["signature"]),
        )
        known = statement["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise LedgerError(f"not a statement ({FORMAT})")
    try:
        public.verify(signature, _canonical(statement))
    except InvalidSignature:
        raise LedgerError(
            "the signature does not hold: the statement was changed after it was signed"
        ) from None
    try:
        mechanisms = [m for r in statement["reservations"] for m in r["mechanisms"]]
        again = epsilon(tuple(GaussianSteps(**m) for m in mechanisms), statement["delta"])
        stated = float(statement["epsilon"])
    except (ValueError, KeyError, TypeError):
        raise LedgerError("signed, but not a statement: something is missing in it") from None
    if again > stated * (1 + _NUMERICS):
        raise LedgerError(
            f"it says epsilon {statement['epsilon']:.3f}, but its mechanisms cost {again:.3f}"
        )
    return Checked(statement, held["public_key"], again)


def closing(entries: Sequence[Entry]) -> dict[int, Entry]:
    """The closing entry of every reservation that has one, by the reservation's number."""
    return {e.body["reservation"]: e for e in entries if e.state != "RESERVED"}


def _reservations(entries: Sequence[Entry], lineage: str) -> list[dict[str, Any]]:
    ends = closing(entries)
    listed = []
    for entry in reservations(entries, lineage):
        end = ends.get(entry.seq)
        facts = {"seq": entry.seq, **entry.body}
        listed.append(
            {name: facts[name] for name in _SHOWN if name in facts}
            | {"state": end.state if end else entry.state, "entry": entry.hash}
            | {"result": end.body.get("result") if end else None}
        )
    return listed


def _canonical(statement: dict[str, Any]) -> bytes:
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode("ascii")
