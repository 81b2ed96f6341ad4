"""The ledger: charged before the first step, never refunded, and it notices tampering."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.privacy.accountant import BudgetExhausted, GaussianSteps, epsilon
from client.privacy.ledger import Ledger, LedgerError

STEPS = GaussianSteps(0.2, 1.0, 2)


def open_ledger(path: Path, budget: float = 50.0, lineage: str = "notes") -> Ledger:
    return Ledger(path, lineage, budget, 1e-5)


def test_a_reservation_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with open_ledger(path) as ledger:
        ledger.reserve(STEPS, run="r", round=1)
        with open_ledger(path) as other:  # another process would see the same
            assert other.history() == (STEPS,)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sampled_from(["commit", "burn", "leave"]), max_size=5))
def test_total_is_the_accountants_whatever_became_of_the_reservations(
    tmp_path_factory: pytest.TempPathFactory, ends: list[str]
) -> None:
    with open_ledger(tmp_path_factory.mktemp("ledger") / "l.sqlite") as ledger:
        for number, end in enumerate(ends, start=1):
            reservation = ledger.reserve(STEPS, run="r", round=number)
            if end == "commit":
                ledger.commit(reservation, "hash")
            elif end == "burn":
                ledger.burn(reservation, "TRAINING_FAILED")
        assert ledger.spent() == epsilon((STEPS,) * len(ends), 1e-5)
        assert ledger.verify() == len(ends) + sum(end != "leave" for end in ends)


def test_what_would_exceed_the_budget_is_refused_and_not_written(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite", budget=3.0) as ledger:
        ledger.reserve(STEPS)
        with pytest.raises(BudgetExhausted, match="the policy allows 3"):
            ledger.reserve(GaussianSteps(0.2, 0.8, 8))
        assert ledger.history() == (STEPS,)
        ledger.reserve(GaussianSteps(0.01, 5.0, 1))


def test_a_reservation_closes_once(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        reservation = ledger.reserve(STEPS)
        ledger.commit(reservation, "hash")
        with pytest.raises(LedgerError, match="closed already"):
            ledger.burn(reservation, "INTERNAL")
        assert [e.state for e in ledger.entries()] == ["RESERVED", "COMMITTED"]


def test_history_can_be_asked_by_run_and_round_and_lineage(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        ledger.reserve(STEPS, run="a", round=1)
        ledger.reserve(STEPS, run="a", round=2)
        ledger.reserve(STEPS, run="b", round=1)
        assert [len(ledger.history(*q)) for q in ((), ("a",), ("a", 1), ("c",))] == [3, 2, 1, 0]
    with open_ledger(path, lineage="other notes") as other:
        assert other.spent() == 0.0


@pytest.mark.parametrize("statement", ["UPDATE entry SET body = '{}'", "DELETE FROM entry"])
def test_entries_cannot_be_changed_through_sql(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        ledger.reserve(STEPS)
    with sqlite3.connect(path) as db, pytest.raises(sqlite3.DatabaseError, match="append-only"):
        db.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET body = replace(body, '0.2', '0.1') WHERE seq = 1",
        "UPDATE entry SET state = 'BURNED' WHERE seq = 2",
        "DELETE FROM entry WHERE seq = 1",
        "DELETE FROM entry WHERE seq = 2",
    ],
)
def test_tampering_with_the_file_breaks_the_chain(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        for _ in range(3):
            ledger.reserve(STEPS)
    with sqlite3.connect(path) as db:
        db.execute("DROP TRIGGER no_update")
        db.execute("DROP TRIGGER no_delete")
        db.execute(statement)
    with open_ledger(path) as ledger, pytest.raises(LedgerError, match="chain breaks"):
        ledger.reserve(STEPS)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database at all, just bytes" * 50)
    with pytest.raises(LedgerError, match="not a usable ledger"):
        open_ledger(path)


def test_a_killed_process_leaves_its_charge(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from client.privacy.ledger import Ledger;"
        "from client.privacy.accountant import GaussianSteps;"
        "l = Ledger(Path(sys.argv[1]), 'notes', 50.0, 1e-5);"
        "l.reserve(GaussianSteps(0.2, 1.0, 2), run='r', round=1);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    with open_ledger(path) as ledger:
        assert ledger.history() == (STEPS,)
        assert ledger.verify() == 1
