"""The anchor: the ledger's length and head hash on a second path, to show a rolled-back disk.

A ledger that was put back from a backup or snapshot is a sound chain; it only has forgotten what
was spent since. The anchor lies elsewhere (another disk, another machine's share) and is not
rolled back with it.

Order of writing: the ledger first, then the anchor, each durable; the entry takes effect (a sample
is drawn, a reply is sent) only after both. So after a crash between the two the ledger is ahead by
the one entry that took no effect yet: the anchor is written again, and all is well. A ledger that
is *behind*, or holds another entry where the anchor looks, was rolled back: nothing may be spent.

Entries record which anchor they were written under, so that a site may begin to use one, move it,
or replace one that is lost by naming a new path, and yet an anchor that vanished or was itself put
back from a backup is noticed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.privacy import durable
from client.privacy.chain import Entry, LedgerError
from client.privacy.site_key import SiteKey

_REMEDY = (
    "put the newest copy back; where there is none, count the whole budget of this data as spent"
)
GONE = f"the ledger is gone, and what was made with it is not: {_REMEDY}"
_NEW_PATH = "if the ledger is known to be the newest copy, name a new path for the anchor"


@dataclass(frozen=True)
class Mark:
    """What an anchor says: the ledger had ``seq`` entries, the last with this ``hash``."""

    seq: int
    hash: str


@dataclass(frozen=True)
class Anchor:
    """The anchor of one ledger, in the file ``path``."""

    path: Path
    key: SiteKey

    @property
    def name(self) -> str:
        """What entries call this anchor: a digest, for a path does not belong into a ledger."""
        return hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]

    def write(self, mark: Mark) -> None:
        """Replace what the anchor says, durably. Raises LedgerError when that is impossible."""
        code = self.key.mac_anchor(f"{mark.seq}\n{mark.hash}")
        text = json.dumps({"seq": mark.seq, "hash": mark.hash, "mac": code}) + "\n"
        try:
            durable.replace(self.path, text.encode())
        except OSError as problem:
            raise LedgerError(
                f"{self.path}: the ledger's anchor cannot be written ({problem}): make the path "
                "writable, or name another in the site policy"
            ) from None

    def read(self) -> Mark | None:
        """What the anchor says; None where there is no file. Raises LedgerError on any other."""
        try:
            held = json.loads(self.path.read_text(encoding="ascii"))
            mark, code = Mark(int(held["seq"]), str(held["hash"])), str(held["mac"])
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise LedgerError(f"{self.path}: the anchor cannot be read ({problem})") from None
        except (ValueError, KeyError, TypeError):
            raise LedgerError(f"{self.path}: is not an anchor; {_NEW_PATH}") from None
        if not hmac.compare_digest(code, self.key.mac_anchor(f"{mark.seq}\n{mark.hash}")):
            raise LedgerError(f"{self.path}: not written with this site's key; {_NEW_PATH}")
        return mark

    def require_known(self, mark: Mark | None, entries: Sequence[Entry]) -> None:
        """Return when the ledger holds all that the anchor has seen.

        ``mark`` must have been read before ``entries``, or a writer in between looks like a
        rollback. Raises LedgerError.
        """
        if mark is None:
            # A single entry may be the first ever, cut off from its anchor by a crash.
            if len(entries) > 1 and entries[-1].body["anchor"] == self.name:
                raise LedgerError(
                    f"{self.path}: the ledger's anchor is missing: make its disk available, or, "
                    f"{_NEW_PATH}"
                )
            return
        if mark.seq > len(entries):
            raise LedgerError(
                f"the anchor has seen {mark.seq} entries, the ledger holds {len(entries)}: the "
                f"ledger is an older copy; {_REMEDY}"
            )
        if mark.seq and entries[mark.seq - 1].hash != mark.hash:
            raise LedgerError(
                f"entry {mark.seq} is not the one the anchor has seen: the ledger was rolled back "
                f"and written to since; {_REMEDY}"
            )

    def repaired(self, mark: Mark | None, entries: Sequence[Entry]) -> Mark | None:
        """What the anchor says, once it has caught up with the entry that a crash kept from it.

        Only the ledger's one writer may call it. Raises LedgerError where ``require_known`` does,
        and when the anchor has missed more than that entry: then it is the older copy.
        """
        self.require_known(mark, entries)
        seen = mark.seq if mark else 0
        missed = [e for e in entries[seen:] if e.body["anchor"] == self.name]
        if len(missed) > 1:
            raise LedgerError(
                f"{self.path}: the anchor has missed {len(missed)} entries: it is an older copy; "
                f"{_NEW_PATH}"
            )
        if seen < len(entries):
            mark = Mark(len(entries), entries[-1].hash)
            self.write(mark)
        return mark
