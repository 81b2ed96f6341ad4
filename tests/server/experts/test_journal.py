"""A record of work: what is finished stays finished, and other work is not mixed in."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from conf.load import ConfigError
from server.experts.journal import Journal


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_was_written_is_found_again_exactly(tmp_path: Path) -> None:
    file = tmp_path / "new" / "log.jsonl"
    journal = Journal(file, {"seed": 1, "names": ("a", "b")})
    values = [0.1 + 0.2, 1e-300, -1 / 3]
    journal.append({"kind": "x", "values": values})
    again = Journal(file, {"seed": 1, "names": ("a", "b")})
    assert again.records == journal.records == [{"kind": "x", "values": values}]
    assert (again.of("x"), again.of("y")) == (again.records, [])


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_does_not_count_and_is_gone(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "log.jsonl"
    journal = Journal(file, {"seed": 1})
    journal.append({"kind": "a", "text": "x" * 30})
    journal.append({"kind": "b", "text": "x" * 30})
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    again = Journal(file, {"seed": 1})
    assert [record["kind"] for record in again.records] == ["a"]
    again.append(journal.records[1])
    assert file.read_bytes() == whole


def test_a_file_cut_in_its_first_line_is_begun_again(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    Journal(file, {"seed": 1})
    file.write_bytes(file.read_bytes()[:-3])
    assert Journal(file, {"seed": 1}).records == []
    assert Journal(file, {"seed": 1}).records == []


def test_a_disk_that_takes_no_more_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "log.jsonl"
    journal = Journal(file, {"seed": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match=r"log\.jsonl: cannot be written \(No space left on dev"):
            journal.append({"kind": "a"})
    assert journal.records == Journal(file, {"seed": 1}).records == []


def test_other_work_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    Journal(file, {"seed": 1, "rank": 2}).append({"kind": "a"})
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"holds other work \(another seed\); give what"):
        Journal(file, {"seed": 2, "rank": 2})
    for other in (b"notes of somebody\n", b"[1, 2]\n"):
        file.write_bytes(other)
        with pytest.raises(ConfigError, match=r"log.jsonl: (not a record|holds other work)"):
            Journal(file, {"seed": 1})
        assert file.read_bytes() == other
    assert before
