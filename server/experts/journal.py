"""A record of long work that can be gone on with: one JSON line for each piece that is finished.

The first line says what the work is. Work that is started again with the same first line finds its
pieces; with another one it is refused, so that results of two different questions never mix. A
line is on disk before ``append`` returns; half a line, left by a crash, does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.load import ConfigError


class Journal:
    """The finished pieces of one work, in order, in a JSONL file."""

    def __init__(self, path: Path, what: Mapping[str, Any]) -> None:
        """Open or begin the file of the work ``what`` (plain JSON values).

        Raises ConfigError when the file holds other work, or is no such file.
        """
        self.path = path
        head = json.loads(json.dumps(what))  # as it will be read back: tuples become lists
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in kept.splitlines()]
        except ValueError:
            raise ConfigError(f"{path}: not a record of earlier work; take another out") from None
        if lines and lines[0] != head:
            differing = sorted(
                key
                for key in {*head, *(lines[0] if isinstance(lines[0], dict) else ())}
                if not isinstance(lines[0], dict) or head.get(key) != lines[0].get(key)
            )
            raise ConfigError(
                f"{path}: holds other work (another {', '.join(differing)}); give what it was "
                "started with, or take another out"
            )
        self.records: list[dict[str, Any]] = lines[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(kept) < len(whole):
            os.truncate(path, len(kept))
        if not lines:
            self._write(head)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a finished piece; durable on return. Raises OSError naming the file."""
        self._write(record)
        self.records.append(json.loads(json.dumps(record)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records whose ``kind`` is this, in order."""
        return [record for record in self.records if record.get("kind") == kind]

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:  # of a disk that is full it does not say of which file
            raise OSError(
                f"{self.path}: cannot be written ({problem.strerror}); what it holds is kept: make "
                "room and give the same command again"
            ) from None
