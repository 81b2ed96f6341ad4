"""Small files that are on disk, whole and with their name, once the call returns."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from adapters.disk import to_disk


def replace(path: Path, content: bytes) -> None:
    """Put ``content`` in the place of what ``path`` held. A crash leaves the old or the new."""
    part = _written_beside(path, content)
    part.replace(path)
    to_disk(path.parent)


def create(path: Path, content: bytes) -> None:
    """Write a file that was not there, readable by its owner only.

    Raises FileExistsError where it is there already; it is then left as it was.
    """
    part = _written_beside(path, content)
    try:
        os.link(part, path)  # unlike a rename, it never takes the place of another file
    finally:
        part.unlink()
    to_disk(path.parent)


def _written_beside(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")  # mode 0600
    with os.fdopen(number, "wb") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())
    return Path(name)
