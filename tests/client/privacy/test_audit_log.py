"""The audit log: on disk before the message moves, and no line can be changed unseen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.privacy.audit_log import GENESIS, AuditLog, AuditLogError, Line, verify

TASK = Line("in", "TASK", "d" * 64, 1000, run="first", round=1)
RESULT = Line("out", "RESULT", "e" * 64, 500, run="first", round=1, facts=("site", "steps"))
REFUSAL = Line("out", "LIMIT_EXCEEDED", "f" * 64, 50, "the plan exceeds a limit", "first", 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "site.audit.jsonl"


@pytest.fixture
def written(path: Path) -> list[str]:
    """Heads of a log of six lines."""
    log = AuditLog(path)
    return [log.append(line) for line in (TASK, RESULT, TASK, REFUSAL, TASK, RESULT)]


def test_lines_follow_each_other_and_say_what_happened(path: Path, written: list[str]) -> None:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["previous"] for line in lines] == [GENESIS, *written[:-1]]
    assert [line["hash"] for line in lines] == written
    assert lines[3]["reason"] == "the plan exceeds a limit"
    assert lines[1]["facts"] == ["site", "steps"]
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert verify(path, written) == 6


def test_others_on_the_machine_cannot_read_it(path: Path, written: list[str]) -> None:
    assert path.stat().st_mode & 0o077 == 0


def test_a_log_that_was_never_begun_is_sound_unless_the_ledger_knows_of_one(path: Path) -> None:
    assert verify(path) == 0
    with pytest.raises(AuditLogError, match="1 of them known to the ledger"):
        verify(path, ["0" * 63 + "1"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_line_that_was_changed_removed_doubled_or_moved_shows(
    data: st.DataObject, path: Path, written: list[str]
) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    i = data.draw(st.integers(0, 5))
    how = data.draw(st.sampled_from(["byte", "drop", "double", "swap", "field", "insert", "space"]))
    if how == "byte":
        at = data.draw(st.integers(0, len(lines[i]) - 1))
        other = data.draw(st.integers(0, 255).filter(lambda b: b != lines[i][at]))
        lines[i] = lines[i][:at] + bytes([other]) + lines[i][at + 1 :]
    elif how == "space":  # says the same to a JSON reader
        lines[i] = lines[i].replace(b": ", b":  ", 1)
    elif how == "drop":
        i = data.draw(st.integers(0, 4))  # the last one's absence is the ledger's to know
        del lines[i]
    elif how == "double":
        lines.insert(i, lines[i])
    elif how == "swap":
        j = data.draw(st.integers(0, 5).filter(lambda j: j != i))
        lines[i], lines[j] = lines[j], lines[i]
    elif how == "field":
        entry: dict[str, Any] = json.loads(lines[i])
        entry["code"] = "QUIET_HOURS"
        lines[i] = json.dumps(entry).encode() + b"\n"
    else:
        lines.insert(i, b"\n")
    changed = path.with_name("changed.jsonl")
    changed.write_bytes(b"".join(lines))
    if changed.read_bytes() == whole:
        return
    with pytest.raises(AuditLogError, match=r"breaks at line|lines are missing"):
        verify(changed, written)


@pytest.mark.parametrize("i", range(6))
def test_a_line_forged_with_a_hash_of_its_own_shows(i: int, path: Path, written: list[str]) -> None:
    """The next line names the hash it followed; the last one's hash is the ledger's to know."""
    lines = path.read_bytes().splitlines(keepends=True)
    entry: dict[str, Any] = json.loads(lines[i])
    body = {key: value for key, value in entry.items() if key != "hash"} | {"bytes": 1}
    forged = body | {"hash": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}
    lines[i] = json.dumps(forged).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    expected = f"breaks at line {i + 2}" if i < 5 else "1 of them known to the ledger"
    with pytest.raises(AuditLogError, match=expected):
        verify(path, written)


def test_lines_cut_off_at_the_end_show_against_what_the_ledger_knows(
    path: Path, written: list[str]
) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    assert verify(path) == 4  # a chain alone cannot tell
    with pytest.raises(AuditLogError, match="2 of them known to the ledger"):
        verify(path, written)
    AuditLog(path).append(TASK)  # and going on does not cover it
    with pytest.raises(AuditLogError, match="2 of them known to the ledger"):
        verify(path, written)


def test_the_line_is_on_disk_when_the_call_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        real(descriptor)
        name = os.path.realpath(f"/proc/self/fd/{descriptor}")
        synced.append((Path(name).name, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", watched)
    AuditLog(path).append(TASK)
    assert synced[0] == (path.name, path.stat().st_size)
    assert synced[1][0] == path.parent.name  # the new file's name too


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_line_that_cannot_be_written_is_not_there_and_not_believed(
    step: str, path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    if step == "fsync":

        def fail(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(AuditLogError, match="Input/output error"):
            AuditLog(path).append(TASK)
    else:  # a limit on the file's size stands for a full disk: part of the line is written
        script = (
            "import resource, signal, sys; from pathlib import Path\n"
            "from client.privacy.audit_log import AuditLog, AuditLogError, Line\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "size = Path(sys.argv[1]).stat().st_size + 20\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
            "try: AuditLog(Path(sys.argv[1])).append(Line('in', 'TASK', 'd', 1))\n"
            "except AuditLogError as problem: sys.exit(f'{problem}')\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
        )
        assert "cannot be written (the line was cut short); make room" in run.stderr
    assert path.read_bytes() == before
    monkeypatch.undo()
    AuditLog(path).append(TASK)
    assert verify(path, written) == 7


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda raw: raw[:-5], "ends in half a line"),
        (lambda raw: raw.replace(b'"seq": 6', b'"seq": 7'), "its last line was changed"),
        (lambda raw: raw + b"\n", "its last line was changed"),
        (lambda raw: raw + b"[]\n", "its last line was changed"),
    ],
)
def test_a_log_whose_end_is_unsound_is_not_written_on(
    damage: Any, told: str, path: Path, written: list[str]
) -> None:
    path.write_bytes(damage(path.read_bytes()))
    damaged = path.read_bytes()
    with pytest.raises(AuditLogError, match=told):
        AuditLog(path).append(TASK)
    assert path.read_bytes() == damaged


def test_processes_that_write_at_once_leave_one_chain(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from client.privacy.audit_log import AuditLog, Line\n"
        "for i in range(40): AuditLog(Path(sys.argv[1])).append(Line('in', 'TASK', 'd', i))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    assert verify(path) == 120


def test_a_process_killed_while_it_writes_leaves_a_chain_that_goes_on(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from client.privacy.audit_log import AuditLog, Line\n"
        "while True: AuditLog(Path(sys.argv[1])).append(Line('in', 'TASK', 'd', 1)); print(flush=1)"
    )
    for i in range(4):
        writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(5 + 3 * i):
            writer.stdout.readline()
        writer.kill()
        writer.wait()
        writer.stdout.close()
    lines = verify(path)
    assert lines >= 5 + 8 + 11 + 14
    AuditLog(path).append(TASK)
    assert verify(path) == lines + 1
