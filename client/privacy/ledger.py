"""The privacy ledger of one site: durable, append-only, written before the first noisy step.

A reservation is on disk (SQLite, WAL, ``synchronous=FULL``) before a sample is drawn, and counts
from then on whatever happens: a crash never gives budget back. Entries are hash-chained, so an
entry that was changed or removed shows in ``verify``, unless it is the last ones that are gone. The
budget belongs to a data lineage and holds over all rounds, runs and coordinators.

States of a reservation: RESERVED, then COMMITTED (its result was released) or BURNED (it failed).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.privacy.accountant import BudgetExhausted, GaussianSteps, History, epsilon

_GENESIS = "0" * 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    seq INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('RESERVED', 'COMMITTED', 'BURNED')),
    body TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE
);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


class LedgerError(RuntimeError):
    """The ledger cannot be read or does not verify; nothing may be spent until that is mended."""


@dataclass(frozen=True)
class Reservation:
    """A charge that is on disk. ``seq`` identifies it in the ledger."""

    seq: int
    steps: GaussianSteps


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    seq: int
    state: str
    body: dict[str, Any]
    previous: str
    hash: str


class Ledger:
    """The ledger file of one site. Open it for a round, close it after.

    ``budget`` and ``delta`` come from the site policy; ``lineage`` names the data they protect.
    """

    def __init__(self, path: Path, lineage: str, budget: float, delta: float) -> None:
        self.lineage, self.budget, self.delta = lineage, budget, delta
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as problem:
            raise LedgerError(f"{path}: not a usable ledger ({problem})") from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reserve(self, steps: GaussianSteps, **facts: Any) -> Reservation:
        """Charge ``steps`` and return once the charge is on disk.

        ``facts`` (run, round, plan, ...) are recorded beside it; they must be JSON. Check and write
        happen in one transaction, so two processes cannot both take the last of the budget. Raises
        BudgetExhausted, and writes nothing, when the budget would be exceeded.
        """
        with self._transaction():
            entries = self._entries()
            spent = epsilon((*self._charged(entries), steps), self.delta)
            if not spent <= self.budget:  # also when it is not a number
                raise BudgetExhausted(
                    f"epsilon would be {spent:.3f}, the policy allows {self.budget:g}"
                )
            body = {
                "lineage": self.lineage,
                "sampling_rate": steps.sampling_rate,
                "noise_multiplier": steps.noise_multiplier,
                "steps": steps.steps,
                "delta": self.delta,
                "epsilon_after": spent,
                **facts,
            }
            return Reservation(self._append("RESERVED", body, entries), steps)

    def commit(self, reservation: Reservation, result: str) -> None:
        """Record that the result with hash ``result`` was released under the reservation."""
        self._close_reservation(reservation, "COMMITTED", {"result": result})

    def burn(self, reservation: Reservation, reason: str) -> None:
        """Record that the reservation ended without a release. It stays charged."""
        self._close_reservation(reservation, "BURNED", {"reason": reason})

    def history(self, run: str | None = None, round: int | None = None) -> History:
        """Everything ever charged to this lineage (or to one run, or one round), in order."""
        return self._charged(self._entries(), run, round)

    def spent(self) -> float:
        """Epsilon of all of ``history`` at the ledger's delta."""
        return epsilon(self.history(), self.delta)

    def entries(self) -> list[Entry]:
        """All entries, verified. Raises LedgerError when the chain is broken."""
        return self._entries()

    def verify(self) -> int:
        """Number of entries, when chain and states are sound. Raises LedgerError otherwise."""
        return len(self._entries())

    def _close_reservation(
        self, reservation: Reservation, state: str, body: dict[str, Any]
    ) -> None:
        with self._transaction():
            entries = self._entries()
            closed = {e.body["reservation"] for e in entries if e.state != "RESERVED"}
            if reservation.seq in closed:
                raise LedgerError(f"reservation {reservation.seq} is closed already")
            self._append(state, {"reservation": reservation.seq, **body}, entries)

    def _charged(
        self, entries: list[Entry], run: str | None = None, round: int | None = None
    ) -> History:
        return tuple(
            GaussianSteps(e.body["sampling_rate"], e.body["noise_multiplier"], e.body["steps"])
            for e in entries
            if e.state == "RESERVED"
            and e.body["lineage"] == self.lineage
            and (run is None or e.body.get("run") == run)
            and (round is None or e.body.get("round") == round)
        )

    def _append(self, state: str, body: dict[str, Any], entries: list[Entry]) -> int:
        seq = len(entries) + 1
        previous = entries[-1].hash if entries else _GENESIS
        stamped = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **body}
        text = json.dumps(stamped, sort_keys=True)
        self._db.execute(
            "INSERT INTO entry VALUES (?, ?, ?, ?, ?)",
            (seq, state, text, previous, _hash(seq, state, text, previous)),
        )
        return seq

    def _entries(self) -> list[Entry]:
        entries, previous = [], _GENESIS
        rows = self._db.execute("SELECT seq, state, body, previous, hash FROM entry ORDER BY seq")
        for expected, (seq, state, text, before, digest) in enumerate(rows, start=1):
            sound = seq == expected and before == previous
            if not sound or digest != _hash(seq, state, text, before):
                raise LedgerError(f"the hash chain breaks at entry {expected}")
            entries.append(Entry(seq, state, json.loads(text), before, digest))
            previous = digest
        return entries

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _hash(seq: int, state: str, body: str, previous: str) -> str:
    return hashlib.sha256(f"{seq}\n{state}\n{body}\n{previous}".encode()).hexdigest()
