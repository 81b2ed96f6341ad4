"""The privacy ledger of one site: durable, append-only, written before the first noisy step.

A reservation is on disk before a sample is drawn, and counts from then on whatever happens: a crash
never gives budget back. Entries are chained and carry the site's MAC (``client.privacy.chain``); an
anchor elsewhere shows a ledger that was rolled back (``client.privacy.anchor``). The budget belongs
to a data lineage and holds over all rounds, runs, coordinators and base models.

States of a reservation: RESERVED, then COMMITTED (it has its one reply) or BURNED (it failed). The
reply is stored in the transaction that commits, and only then sent. So whatever was sent has a
COMMITTED reservation, and a task that comes again gets the same bytes at no charge. A task whose
reservation is only RESERVED or BURNED takes a new reservation, with fresh randomness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from client.privacy import accountant, site_key
from client.privacy.accountant import BudgetExhausted, GaussianSteps, History, epsilon
from client.privacy.anchor import GONE, Anchor
from client.privacy.chain import Entry, LedgerError, State, next_row
from client.privacy.ledger_file import LedgerFile
from conf.policy import SitePolicy

ADJACENCY = "one unit added or removed"
MECHANISM = "Poisson-sampled Gaussian"
_KEPT_REPLIES = 4  # the newest; an older task that comes again is charged again


@dataclass(frozen=True)
class Reservation:
    """A charge that is on disk. ``seq`` identifies it in the ledger."""

    seq: int
    mechanisms: History
    task: str


class Ledger:
    """The ledger of one site. Open it for a round, close it after.

    ``budget`` and ``delta`` come from the site policy; ``lineage`` names the data they protect.
    ``key`` is the file of the site's secret (None: beside the ledger), ``anchor`` that of the
    anchor (None: a rollback goes unnoticed). Reading never waits for a writer.
    """

    def __init__(
        self,
        path: Path,
        lineage: str,
        budget: float,
        delta: float,
        key: Path | None = None,
        anchor: Path | None = None,
    ) -> None:
        self.lineage, self.budget, self.delta = lineage, budget, delta
        anchored = anchor is not None and anchor.exists()
        own_key = path.with_name(path.name + ".key")
        if not path.exists() and begun(path, key, anchor):
            raise LedgerError(f"{path}: {GONE}")
        self._file = LedgerFile(path)
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        new = self._file.head() is None and not anchored
        self.key = site_key.obtain(key or own_key, may_create=new)
        if key:
            site_key.leave_trace(site_key.trace(key, path), path)
        self._anchor = Anchor(anchor, self.key) if anchor else None

    @classmethod
    def of(cls, policy: SitePolicy) -> Ledger:
        """The ledger that a site policy names. Raises LedgerError."""
        p = policy.privacy
        return cls(
            policy.ledger, policy.lineage, p.epsilon, p.delta, policy.site_key, policy.anchor
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def turn(self) -> AbstractContextManager[object]:
        """Be the only writer until the block ends; waits for the process whose turn it is.

        A round holds it from the search for a stored reply to the commit. So of two processes with
        the same task, the second finds the first one's reply.
        """
        return self._lock

    def reserve(self, mechanisms: History, *, task: str, **facts: Any) -> Reservation:
        """Charge all of ``mechanisms`` and return once the charge is on disk.

        ``task`` is the hash of what was asked; ``facts`` (run, round, unit, ...) are recorded
        beside it and must be JSON. Check and write are one transaction, so two processes cannot
        both take the last of the budget. Raises BudgetExhausted, and writes nothing, when the
        budget would be exceeded; ValueError without a mechanism; LedgerError.
        """
        if not mechanisms:
            raise ValueError("a reservation charges at least one mechanism")
        with self._transaction() as entries:
            spent = epsilon((*charged(entries, self.lineage), *mechanisms), self.delta)
            if not spent <= self.budget:  # also when it is not a number
                raise BudgetExhausted(
                    f"epsilon would be {spent:.3f}, the policy allows {self.budget:g}"
                )
            body = {
                **facts,
                "lineage": self.lineage,
                "task": task,
                "adjacency": ADJACENCY,
                "mechanism": MECHANISM,
                "mechanisms": [asdict(m) for m in mechanisms],
                "delta": self.delta,
                "epsilon_after": spent,
                "accountant": accountant.NAME,
                "code": f"wardround {version('wardround')}",
            }
            return Reservation(self._append(entries, "RESERVED", body), mechanisms, task)

    def commit(self, reservation: Reservation, reply: bytes, **facts: Any) -> None:
        """Store ``reply`` as the reservation's one and only. Once this returns it may be sent.

        Raises LedgerError when the reservation is closed, or its task has a reply already under
        the same ``share`` (see ``reply``).
        """
        with self._transaction() as entries:
            (own,) = (e.body for e in entries if e.seq == reservation.seq)
            if self._reply(entries, reservation.task, {"share": own.get("share")}) is not None:
                raise LedgerError("the task was answered under another reservation")
            digest = hashlib.sha256(reply).hexdigest()
            self._close(entries, reservation, "COMMITTED", {**facts, "reply": digest})
            self._file.store_reply(reservation.seq, reply, _KEPT_REPLIES)

    def burn(self, reservation: Reservation, reason: str) -> None:
        """Record that the reservation ended without a reply. It stays charged."""
        with self._transaction() as entries:
            self._close(entries, reservation, "BURNED", {"reason": reason})

    def reply(self, task: str, **facts: Any) -> bytes | None:
        """The reply to ``task`` on this lineage; None where there is none, or none any more.

        Only one whose reservation was made with these ``facts``: what the policy shared then, and
        does not share now, must not leave.
        """
        with self._transaction() as entries:  # what a crash left half anchored is not sent yet
            return self._reply(entries, task, facts)

    def history(self, run: str | None = None, round: int | None = None) -> History:
        """Everything ever charged to this lineage (or to one run, or one round), in order."""
        return charged(self.entries(), self.lineage, run, round)

    def spent(self) -> float:
        """Epsilon of all of ``history`` at the ledger's delta."""
        return epsilon(self.history(), self.delta)

    def entries(self) -> list[Entry]:
        """All entries, of every lineage. Raises LedgerError unless chain and anchor are sound."""
        if self._anchor is None:
            return self._file.entries(self.key.mac_entry)
        mark = self._anchor.read()  # first: what is written in between is no rollback
        entries = self._file.entries(self.key.mac_entry)
        self._anchor.require_known(mark, entries)
        return entries

    def verify(self) -> int:
        """Number of entries, when all of them and the anchor are sound. Raises LedgerError."""
        return len(self.entries())

    def _reply(self, entries: Sequence[Entry], task: str, facts: Mapping[str, Any]) -> bytes | None:
        wanted = {**facts, "task": task}.items()
        asked = {
            e.seq
            for e in reservations(entries, self.lineage)
            if all(e.body.get(name) == value for name, value in wanted)
        }
        for entry in entries:
            if entry.state != "COMMITTED" or entry.body["reservation"] not in asked:
                continue
            content = self._file.reply(entry.body["reservation"])
            if content is None:
                continue
            if hashlib.sha256(content).hexdigest() != entry.body["reply"]:
                raise LedgerError(f"the reply of entry {entry.seq} was changed: restore a backup")
            return content
        return None

    def _close(
        self, entries: Sequence[Entry], reservation: Reservation, state: State, body: dict[str, Any]
    ) -> None:
        if any(e.body.get("reservation") == reservation.seq for e in entries):
            raise LedgerError(f"reservation {reservation.seq} is closed already")
        self._append(entries, state, {**body, "reservation": reservation.seq})

    def _append(self, entries: Sequence[Entry], state: State, body: dict[str, Any]) -> int:
        at = datetime.now(UTC).isoformat(timespec="seconds")
        anchor = self._anchor.name if self._anchor else None
        row = next_row(entries, state, {**body, "at": at, "anchor": anchor}, self.key.mac_entry)
        self._file.append(row)
        return row[0]

    @contextmanager
    def _transaction(self) -> Iterator[list[Entry]]:
        """The sound entries, to add one to: it is on disk and anchored when the block has ended."""
        with self._lock:
            mark = self._anchor.read() if self._anchor else None
            with self._file.transaction():
                entries = self._file.entries(self.key.mac_entry)
                if self._anchor:
                    mark = self._anchor.repaired(mark, entries)
                yield entries
            if self._anchor and (head := self._file.head()) and head != mark:
                self._anchor.write(head)


def begun(path: Path, key: Path | None, anchor: Path | None) -> bool:
    """Whether there is, or once was, a ledger at ``path``; ``key`` and ``anchor`` as for Ledger.

    What is made with a ledger outlives it: its own key, or a trace beside a key that lies elsewhere
    and may be that of several ledgers; and its anchor.
    """
    trace = site_key.trace(key, path) if key else path.with_name(path.name + ".key")
    return path.exists() or trace.exists() or (anchor is not None and anchor.exists())


def reservations(entries: Sequence[Entry], lineage: str) -> list[Entry]:
    """The entries that charge ``lineage``."""
    return [e for e in entries if e.state == "RESERVED" and e.body["lineage"] == lineage]


def charged(
    entries: Sequence[Entry], lineage: str, run: str | None = None, round: int | None = None
) -> History:
    """Every mechanism charged to ``lineage`` (or to one run, or one round of it), in order."""
    return tuple(
        GaussianSteps(**mechanism)
        for e in reservations(entries, lineage)
        if (run is None or e.body.get("run") == run)
        and (round is None or e.body.get("round") == round)
        for mechanism in e.body["mechanisms"]
    )
