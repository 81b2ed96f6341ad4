"""The audit log of a site: one line for every message in and out, append-only and hash-chained.

A line is on disk (fsync) before the message is worked on or leaves; where that fails, the message
stops. A line holds no value that came from a note, only what kind of message it was, a digest of
its content, and the names of the facts that left. Each line carries the hash of the one before, so
a line that was changed, removed or moved shows in ``verify``. Lines cut off at the end, or a log
written anew, show against the heads that the ledger keeps: each reservation records the hash of
the line that asked for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from adapters.disk import to_disk

GENESIS = "0" * 64
_LONGEST = 64 * 1024  # bytes of a line; what is written is far shorter

Direction = Literal["in", "out"]


class AuditLogError(RuntimeError):
    """The log cannot be written or does not verify; the message says where and what to do."""


@dataclass(frozen=True)
class Line:
    """One message. ``code`` is TASK or MALFORMED (in), RESULT or the refusal's code (out)."""

    direction: Direction
    code: str
    digest: str  # SHA-256 of the content, see transport.wire.digest
    bytes: int
    reason: str = ""  # of a refusal, from the fixed list
    run: str | None = None
    round: int | None = None
    facts: tuple[str, ...] = ()  # names of those that left


class AuditLog:
    """The log in one file; made at the first line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Line) -> str:
        """Put one line on disk and return its hash, the new head.

        Raises AuditLogError when it cannot be written, or when the last line is not whole: what
        follows it would prove nothing.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            with os.fdopen(os.open(self.path, flags, 0o600), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released with the file
                size = file.seek(0, os.SEEK_END)
                head, seq = self._last(file, size)
                at = datetime.now(UTC).isoformat(timespec="milliseconds")
                body = {"seq": seq + 1, "at": at, **vars(line), "previous": head}
                entry = {**body, "hash": _hash(body)}
                text = json.dumps(entry).encode() + b"\n"
                try:
                    if file.write(text) != len(text):
                        raise OSError("the line was cut short")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)  # the message will not leave, and half a line is none
                    raise
            if new:
                to_disk(self.path.parent)
        except OSError as problem:
            raise AuditLogError(
                f"{self.path}: cannot be written ({problem.strerror or problem}); make room "
                "on its disk, or check its permissions"
            ) from None
        return str(entry["hash"])

    def _last(self, file: BinaryIO, size: int) -> tuple[str, int]:
        """Hash and number of the last line."""
        if size == 0:
            return GENESIS, 0
        file.seek(max(0, size - _LONGEST))
        tail = file.read()
        if not tail.endswith(b"\n"):
            raise AuditLogError(
                f"{self.path}: ends in half a line (a power failure?); no message left under it, "
                "so remove that half line"
            )
        try:
            entry = _checked(tail.splitlines()[-1])
            return str(entry["hash"]), int(entry["seq"])
        except ValueError:
            raise AuditLogError(
                f"{self.path}: its last line was changed; keep the file under another name as "
                "evidence, and a new one will be begun"
            ) from None


def verify(path: Path, heads: Iterable[str] = ()) -> int:
    """Number of lines, when the chain is sound and holds every head that the ledger recorded.

    Raises AuditLogError naming the first line that was changed, removed or moved, or saying that
    lines are missing.
    """
    seen, previous, number = set(), GENESIS, 0
    for number, text in enumerate(_lines(path), start=1):
        try:
            entry = _checked(text)
            sound = entry["seq"] == number and entry["previous"] == previous
        except ValueError:
            sound = False
        if not sound:
            raise AuditLogError(f"{path}: the hash chain breaks at line {number}")
        previous = str(entry["hash"])
        seen.add(previous)
    if missing := sum(head not in seen for head in heads):
        raise AuditLogError(
            f"{path}: lines are missing, {missing} of them known to the ledger (the log was cut "
            "off or replaced)"
        )
    return number


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for text in file:
                yield text if text.endswith(b"\n") else b""
    except FileNotFoundError:
        return
    except OSError as problem:
        raise AuditLogError(f"{path}: cannot be read ({problem.strerror})") from None


def _checked(text: bytes) -> dict[str, Any]:
    """The line, when it is written as ``append`` writes and its hash is its own, else ValueError.

    The bytes must be the ones written: two ways to write a line would be a change nobody sees.
    """
    entry = json.loads(text)
    if not isinstance(entry, dict) or json.dumps(entry).encode() != text.removesuffix(b"\n"):
        raise ValueError("not a line of this log")
    body = {key: value for key, value in entry.items() if key != "hash"}
    if entry.get("hash") != _hash(body):
        raise ValueError("the hash is not the line's")
    return entry


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
