"""Rolled-back disks, lost keys and vanished files: noticed, and nothing is spent."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from client.privacy import durable
from client.privacy.accountant import GaussianSteps
from client.privacy.anchor import Anchor
from client.privacy.ledger import Ledger, LedgerError

CHARGE = (GaussianSteps(1.0, 8.0, 1),)
Open = Callable[..., Ledger]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Open the one ledger, anchored at the path ``anchor`` unless told otherwise."""

    def make(anchor: str | None = "anchor") -> Ledger:
        path = tmp_path / "disk" / "l.sqlite"
        return Ledger(path, "notes", 50.0, 1e-5, anchor=tmp_path / anchor if anchor else None)

    return make


def spend(opened: Open, times: int = 1, anchor: str | None = "anchor") -> None:
    with opened(anchor) as ledger:
        for _ in range(times):
            ledger.reserve(CHARGE, task="t")


def refused(opened: Open, line: str, anchor: str | None = "anchor") -> None:
    """Nothing can be read, spent or sent, and the reason is one line."""
    for attempt in (
        Ledger.spent,
        lambda own: own.reserve(CHARGE, task="t"),
        lambda o: o.reply("t"),
    ):
        with pytest.raises(LedgerError, match=line) as error, opened(anchor) as ledger:
            attempt(ledger)
        assert "\n" not in str(error.value)


def snapshot(tmp_path: Path) -> Callable[[], None]:
    """Take a snapshot of the ledger's disk; the function puts it back."""
    shutil.copytree(tmp_path / "disk", tmp_path / "snapshot")

    def restore() -> None:
        shutil.rmtree(tmp_path / "disk")
        shutil.copytree(tmp_path / "snapshot", tmp_path / "disk")

    return restore


# --- the anchor --------------------------------------------------------------------------------


def test_a_snapshot_that_was_put_back_is_noticed(opened: Open, tmp_path: Path) -> None:
    spend(opened, 2)
    restore = snapshot(tmp_path)
    spend(opened)
    restore()
    refused(opened, "seen 3 entries, the ledger holds 2: the ledger is an older copy; put the new")


def test_without_an_anchor_it_is_not_and_that_is_why_there_is_one(
    opened: Open, tmp_path: Path
) -> None:
    spend(opened, 2, anchor=None)
    restore = snapshot(tmp_path)
    spend(opened, anchor=None)
    restore()
    with opened(None) as ledger:
        assert ledger.verify() == 2


def test_a_snapshot_that_was_written_to_since_is_noticed(opened: Open, tmp_path: Path) -> None:
    spend(opened, 2)
    restore = snapshot(tmp_path)
    spend(opened)
    restore()
    spend(opened, 3, anchor=None)  # longer than what the anchor has seen
    refused(opened, "entry 3 is not the one the anchor has seen")


def test_a_ledger_that_vanished_is_not_begun_anew(opened: Open, tmp_path: Path) -> None:
    spend(opened)
    shutil.rmtree(tmp_path / "disk")
    refused(opened, "the ledger is gone, and what was made with it is not: put the newest")
    assert not (tmp_path / "disk").exists()


def test_without_an_anchor_a_key_that_is_left_tells_of_a_ledger_that_vanished(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own" / "l.sqlite"
    Ledger(path, "notes", 8.0, 1e-5).close()
    for part in path.parent.glob("l.sqlite*"):
        if part.suffix != ".key":
            part.unlink()
    with pytest.raises(LedgerError, match="the ledger is gone"):
        Ledger(path, "notes", 8.0, 1e-5)
    assert not path.exists()


def test_a_key_that_lies_elsewhere_tells_of_each_ledger_that_vanished(tmp_path: Path) -> None:
    key, path = tmp_path / "keys" / "site.key", tmp_path / "disk" / "l.sqlite"
    Ledger(path, "notes", 8.0, 1e-5, key=key).close()
    Ledger(path, "notes", 8.0, 1e-5, key=key).close()
    shutil.rmtree(path.parent)
    with pytest.raises(LedgerError, match="the ledger is gone"):
        Ledger(path, "notes", 8.0, 1e-5, key=key)
    Ledger(tmp_path / "disk" / "other.sqlite", "notes", 8.0, 1e-5, key=key).close()


def test_a_ledger_that_was_emptied_is_noticed(opened: Open, tmp_path: Path) -> None:
    spend(opened)
    path = tmp_path / "disk" / "l.sqlite"
    for file in path.parent.glob("l.sqlite*"):
        if file.suffix != ".key":
            file.unlink()
    path.touch()
    refused(opened, "the ledger holds 0: the ledger is an older copy")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda a: a.unlink(), "the ledger's anchor is missing: make its disk"),
        (lambda a: a.write_text("{}"), "is not an anchor"),
        (lambda a: a.write_text("\xff"), "is not an anchor"),
        (
            lambda a: a.write_text(json.dumps(json.loads(a.read_text()) | {"seq": 1})),
            "not written with this site's key",
        ),
    ],
)
def test_an_anchor_that_is_missing_or_was_edited_stops_everything(
    opened: Open, tmp_path: Path, change: Callable[[Path], None], line: str
) -> None:
    spend(opened, 3)
    change(tmp_path / "anchor")
    refused(opened, line)
    spend(opened, anchor="another")  # the site's own decision, in its policy
    with opened("another") as ledger:
        assert ledger.verify() == 4


def test_an_anchor_from_a_backup_is_noticed(opened: Open, tmp_path: Path) -> None:
    spend(opened)
    shutil.copy(tmp_path / "anchor", tmp_path / "backup")
    spend(opened, 2)
    shutil.copy(tmp_path / "backup", tmp_path / "anchor")
    with pytest.raises(LedgerError, match="the anchor has missed 2 entries: it is an older copy"):
        spend(opened)


def test_the_entry_that_a_crash_cut_off_is_anchored_later(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spend(opened)

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Anchor, "write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            spend(opened)
    with opened() as ledger:
        assert ledger.verify() == 2  # ahead of the anchor by one
        assert json.loads((tmp_path / "anchor").read_text())["seq"] == 1
        ledger.reserve(CHARGE, task="t")
    assert json.loads((tmp_path / "anchor").read_text())["seq"] == 3


def test_an_anchor_that_cannot_be_written_costs_one_charge_and_not_one_each_time(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    spend(opened)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "replace", full)
        for _ in range(3):
            with pytest.raises(LedgerError, match=r"anchor cannot be written .*No space left"):
                spend(opened)
    spend(opened)
    with opened() as ledger:
        assert ledger.verify() == 3


def test_an_anchor_may_be_begun_moved_and_given_up(opened: Open) -> None:
    for anchor, times in ((None, 2), ("anchor", 2), ("another", 2), (None, 2), ("anchor", 1)):
        spend(opened, times, anchor)
    with opened() as ledger:
        assert ledger.verify() == 9


def test_a_small_file_is_on_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = durable.os.fsync, []

    def watched(number: int) -> None:
        seen.append((tmp_path / "a").exists())
        real(number)

    monkeypatch.setattr(durable.os, "fsync", watched)
    durable.create(tmp_path / "a", b"1")
    assert seen == [False, True]  # its content, then its folder
    with pytest.raises(FileExistsError):
        durable.create(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    durable.replace(tmp_path / "a", b"2")
    assert len(seen) == 5
    assert (tmp_path / "a").read_bytes() == b"2"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# --- the key -----------------------------------------------------------------------------------


def key_file(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "l.sqlite.key"


def test_the_key_is_made_once_and_is_its_owners(opened: Open, tmp_path: Path) -> None:
    spend(opened)
    before = key_file(tmp_path).read_bytes()
    assert key_file(tmp_path).stat().st_mode & 0o777 == 0o600
    spend(opened)
    assert key_file(tmp_path).read_bytes() == before


def test_two_ledgers_may_share_a_key_and_two_keys_differ(tmp_path: Path) -> None:
    key = tmp_path / "site.key"
    shared = [Ledger(tmp_path / name, "n", 8, 1e-5, key=key).key.public for name in ("a", "b")]
    own = Ledger(tmp_path / "c", "n", 8, 1e-5).key.public
    assert shared[0] == shared[1] != own


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda key: key.unlink(), "the site key of this ledger is missing: put it back"),
        (lambda key: key.chmod(0o640), "others can read the site key: run chmod 600"),
        (lambda key: key.write_text("00"), "holds no site key"),
        (lambda key: key.write_text("not hexadecimal"), "holds no site key"),
        (lambda key: key.write_text("ab" * 32), "not written with this site key: put back"),
    ],
)
def test_without_its_key_nothing_is_spent_and_nothing_forgotten(
    opened: Open, tmp_path: Path, change: Callable[[Path], object], line: str
) -> None:
    spend(opened, 2, anchor=None)
    key = key_file(tmp_path)
    content = key.read_bytes()
    change(key)
    refused(opened, line, anchor=None)
    key.write_bytes(content)
    key.chmod(0o600)
    with opened(None) as ledger:
        assert ledger.history() == CHARGE * 2


def test_a_chain_forged_without_the_key_is_refused(opened: Open, tmp_path: Path) -> None:
    """Whoever can write the file can make a sound hash chain; the MAC needs the key."""
    spend(opened, anchor=None)
    other = tmp_path / "other"
    with Ledger(other / "l.sqlite", "notes", 50.0, 1e-5) as forged:
        forged.reserve((GaussianSteps(1.0, 900.0, 1),), task="t")
    (other / "l.sqlite.key").write_bytes(key_file(tmp_path).read_bytes())
    with sqlite3.connect(other / "l.sqlite") as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for file in (tmp_path / "disk").glob("l.sqlite*"):
        file.unlink()
    shutil.copytree(other, tmp_path / "disk", dirs_exist_ok=True)
    refused(opened, "entry 1 was not written with this site key", anchor=None)
