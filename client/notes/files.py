"""Files and lines: plain or gzip, one bounded line at a time.

Guarantee: a file that cannot be opened or ends in the middle of its compression is reported, never
raised; no line takes more than MAX_LINE bytes of memory; decoding errors carry no content.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import BinaryIO, cast

from client.notes.note import NotesError, Reason

MAX_LINE = 64 * 2**20  # bytes, far above any note; a file without line ends cannot fill memory


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder with one of the suffixes, in name order.

    Raises NotesError where a folder has none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.iterdir() if f.is_file())
    found = [f for f in files if f.name.lower().endswith(tuple(suffixes))]
    if not found:
        raise NotesError(f"notes.path={path}: no file named *{' or *'.join(suffixes)} in it")
    return found


def shown(name: str) -> str:
    """A file name that fits on one line and can be printed, whatever the disk holds."""
    return "".join(c if c.isprintable() else "?" for c in name)


def read_lines(path: Path) -> Iterator[tuple[int, bytes | Reason]]:
    """Line number (from 1) and the line's bytes, or why it cannot be had.

    The byte order mark of UTF-8 is dropped. After ``Reason.UNREADABLE`` the file is over; an
    overlong line (``Reason.TOO_LONG``) is passed over and the next is read.
    """
    stream = _open(path)
    if stream is None:
        yield 1, Reason.UNREADABLE
        return
    with stream:
        for number in count(1):
            line = _next_line(stream)
            if line == b"":
                return
            if number == 1 and isinstance(line, bytes):
                line = line.removeprefix(codecs.BOM_UTF8)
            yield number, line
            if line is Reason.UNREADABLE:
                return


def read_json_lines(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, object] | Reason]]:
    """Line number and the JSON object on every line that is not blank, or why there is none."""
    for number, line in read_lines(path):
        if isinstance(line, Reason):
            yield number, line
        elif line.strip():
            yield number, _json_object(line, encoding)


def _json_object(line: bytes, encoding: str) -> dict[str, object] | Reason:
    # The exceptions hold the line itself (JSONDecodeError.doc, UnicodeDecodeError.object): they end
    # here, and nothing is raised while they are handled.
    try:
        value = json.loads(line.decode(encoding))
    except UnicodeError:
        return Reason.ENCODING
    except (ValueError, RecursionError):
        return Reason.BROKEN_JSON
    return value if isinstance(value, dict) else Reason.NOT_AN_OBJECT


def _open(path: Path) -> BinaryIO | None:
    try:
        return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError:
        return None


def _next_line(stream: BinaryIO) -> bytes | Reason:
    """The next line, b"" at the end of the file."""
    try:
        line = stream.readline(MAX_LINE)
        overlong = len(line) == MAX_LINE and not line.endswith(b"\n")
        while len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
    except (OSError, EOFError, zlib.error):
        return Reason.UNREADABLE
    return Reason.TOO_LONG if overlong else line
