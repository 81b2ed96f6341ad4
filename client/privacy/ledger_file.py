"""The ledger as a file: SQLite in WAL mode with ``synchronous=FULL``, in which nothing is changed.

``ledger.sqlite-wal`` beside the file is part of it: copy both, or neither.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.privacy.anchor import Mark
from client.privacy.chain import Entry, LedgerError, Mac, Row, verified

_WAIT_S = 60.0  # for another process's transaction
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    seq INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('RESERVED', 'COMMITTED', 'BURNED')),
    body TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    mac TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS reply (seq INTEGER PRIMARY KEY, content BLOB NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entry
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_other_reply BEFORE UPDATE ON reply
    BEGIN SELECT RAISE(ABORT, 'a reservation has one reply'); END;
"""


class LedgerFile:
    """Rows of one ledger file, made where there is none. Every failure is a LedgerError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def entries(self, mac: Mac | None) -> list[Entry]:
        """All entries, verified as ``chain.verified`` does."""
        query = "SELECT seq, state, body, previous, hash, mac FROM entry ORDER BY seq"
        with self._explained():
            return verified(self._db.execute(query), mac)

    def head(self) -> Mark | None:
        """The last entry's number and hash; None when there is none."""
        with self._explained():
            query = "SELECT seq, hash FROM entry ORDER BY seq DESC LIMIT 1"
            row = self._db.execute(query).fetchone()
        return Mark(*row) if row else None

    def append(self, row: Row) -> None:
        """Add an entry."""
        self._db.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?)", row)

    def reply(self, seq: int) -> bytes | None:
        """The reply stored under reservation ``seq``; None where it was never there, or pruned."""
        with self._explained():
            query = "SELECT content FROM reply WHERE seq = ?"
            row = self._db.execute(query, (seq,)).fetchone()
        return row[0] if row else None

    def store_reply(self, seq: int, content: bytes, keep: int) -> None:
        """Store a reservation's one reply, and drop all but the newest ``keep``."""
        newest = "SELECT seq FROM reply ORDER BY seq DESC LIMIT ?"
        self._db.execute("INSERT INTO reply VALUES (?, ?)", (seq, content))
        self._db.execute(f"DELETE FROM reply WHERE seq NOT IN ({newest})", (keep,))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that the block writes is on disk when it ends, or, when it raises, none of it."""
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as problem:
            raise LedgerError(f"{self.path}: not a usable ledger ({problem})") from None
