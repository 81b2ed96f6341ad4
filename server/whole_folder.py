"""A folder that appears whole, and on disk, or not at all."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.disk import to_disk


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` at the end; after an error nothing is left.

    It is made beside ``out``, and a link to an empty folder is followed. Raises OSError where
    ``out`` exists and is no empty folder, or is one that cannot be replaced: a mount point, or the
    folder that one is in.
    """
    out = out.resolve()
    if out.is_mount() or out == Path.cwd():
        raise OSError(
            errno.EBUSY, "is in use, so no folder can take its place; name one in it", out
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        yield made
        for path in [*made.rglob("*"), made]:
            to_disk(path)
        made.rename(out)
        to_disk(out.parent)
