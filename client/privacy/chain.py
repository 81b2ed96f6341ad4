"""Entries of the ledger, and what makes a chain of them sound.

Each entry's hash covers the one before it, and its MAC (keyed by the site) covers its hash. So an
entry that was changed, removed from the middle or put in shows itself, and nobody without the
site's key can write a chain that passes. What no chain can show is that its last entries are gone:
see ``client.privacy.anchor``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["RESERVED", "COMMITTED", "BURNED"]
Row = tuple[int, State, str, str, str, str]  # seq, state, body, previous, hash, mac
Mac = Callable[[str], str]  # of an entry's hash

GENESIS = "0" * 64  # in place of the hash before the first


class LedgerError(RuntimeError):
    """The ledger cannot be trusted or written. Nothing may be spent; the line says what to do."""


@dataclass(frozen=True)
class Entry:
    """One entry. A closing one (COMMITTED, BURNED) names its ``reservation`` in the body."""

    seq: int  # from 1, without gaps
    state: State
    body: dict[str, Any]
    previous: str
    hash: str
    mac: str


def next_row(entries: Sequence[Entry], state: State, body: dict[str, Any], mac: Mac) -> Row:
    """The row that continues ``entries``; ``body`` must be JSON."""
    seq = len(entries) + 1
    previous = entries[-1].hash if entries else GENESIS
    text = json.dumps(body, sort_keys=True)
    digest = _hash(seq, state, text, previous)
    return seq, state, text, previous, digest, mac(digest)


def verified(rows: Iterable[Row], mac: Mac | None) -> list[Entry]:
    """The entries of ``rows``; with ``mac`` None, of their hashes and states only.

    Raises LedgerError naming the first entry that is not sound.
    """
    entries: list[Entry] = []
    still_open: set[int] = set()
    for expected, (seq, state, text, previous, digest, code) in enumerate(rows, start=1):
        before = entries[-1].hash if entries else GENESIS
        linked = seq == expected and previous == before
        if not linked or digest != _hash(seq, state, text, previous):
            raise LedgerError(f"the hash chain breaks at entry {expected}: restore a backup")
        if mac and not hmac.compare_digest(code, mac(digest)):
            raise LedgerError(
                f"entry {expected} was not written with this site key: put back the key that "
                "belongs to this ledger, or restore a backup of the ledger"
            )
        body = json.loads(text)
        if state == "RESERVED":
            still_open.add(seq)
        elif body["reservation"] in still_open:
            still_open.remove(body["reservation"])
        else:
            raise LedgerError(f"entry {expected} closes no open reservation: restore a backup")
        entries.append(Entry(seq, state, body, previous, digest, code))
    return entries


def _hash(seq: int, state: str, body: str, previous: str) -> str:
    return hashlib.sha256(f"{seq}\n{state}\n{body}\n{previous}".encode()).hexdigest()
