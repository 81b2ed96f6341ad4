"""The ledger: charged before the first step, never refunded, one reply a task, and it verifies."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.privacy.accountant import BudgetExhausted, GaussianSteps, History, epsilon
from client.privacy.ledger import Ledger, LedgerError, Reservation

CHARGE = (GaussianSteps(1.0, 4.0, 2),)  # at full sampling the accountants are quick

mechanisms = st.builds(GaussianSteps, st.just(1.0), st.sampled_from([4.0, 8.0]), st.integers(1, 2))
histories = st.lists(st.lists(mechanisms, min_size=1, max_size=2).map(tuple), max_size=3)


def open_ledger(path: Path, budget: float = 50.0, lineage: str = "notes") -> Ledger:
    return Ledger(path, lineage, budget, 1e-5)


def reserve(ledger: Ledger, task: str = "t", charge: History = CHARGE) -> Reservation:
    return ledger.reserve(charge, task=task)


# --- what it costs -----------------------------------------------------------------------------


def test_a_reservation_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with open_ledger(path) as ledger:
        reserve(ledger)
        with open_ledger(path) as other:  # another process would see the same
            assert other.history() == CHARGE


@settings(deadline=None, max_examples=12)
@given(charges=histories, seed=st.integers(0, 2**32))
def test_the_total_is_the_accountants_whatever_became_of_the_reservations(
    tmp_path_factory: pytest.TempPathFactory, charges: list[History], seed: int
) -> None:
    draw = random.Random(seed)
    path = tmp_path_factory.mktemp("ledger") / "l.sqlite"
    closed = 0
    for number, charge in enumerate(charges):
        with open_ledger(path) as ledger:  # anew, as each round does
            before = ledger.spent()
            reservation = reserve(ledger, f"task {number}", charge)
            assert ledger.spent() > before
            if (end := draw.choice(["commit", "burn", "leave"])) == "commit":
                ledger.commit(reservation, b"reply")
            elif end == "burn":
                ledger.burn(reservation, "TRAINING_FAILED")
            closed += end != "leave"
    with open_ledger(path) as ledger:
        everything = tuple(m for charge in charges for m in charge)
        assert ledger.history() == everything
        assert ledger.spent() == epsilon(everything, 1e-5)
        shuffled = tuple(draw.sample(everything, len(everything)))
        assert ledger.spent() == epsilon(shuffled, 1e-5)  # order does not matter
        assert ledger.verify() == len(charges) + closed
        after = [e.body["epsilon_after"] for e in ledger.entries() if e.state == "RESERVED"]
        assert after == sorted(after)
        assert not after or after[-1] == ledger.spent()


def test_all_mechanisms_of_a_reservation_are_charged_or_none(tmp_path: Path) -> None:
    dear = GaussianSteps(1.0, 0.8, 8)
    with open_ledger(tmp_path / "l.sqlite", budget=3.0) as ledger:
        reserve(ledger)
        for charge in ((dear,), (*CHARGE, dear), (dear, *CHARGE)):
            with pytest.raises(BudgetExhausted, match="the policy allows 3"):
                reserve(ledger, charge=charge)
        assert ledger.history() == CHARGE
        reserve(ledger, charge=(GaussianSteps(1.0, 50.0, 1), GaussianSteps(1.0, 60.0, 2)))
        assert len(ledger.history()) == 3
        with pytest.raises(ValueError, match="at least one mechanism"):
            reserve(ledger, charge=())


def test_history_can_be_asked_by_run_and_round_and_lineage(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        for run, round in (("a", 1), ("a", 2), ("b", 1)):
            ledger.reserve(CHARGE, task="t", run=run, round=round)
        assert [len(ledger.history(*q)) for q in ((), ("a",), ("a", 1), ("c",))] == [3, 2, 1, 0]
    with open_ledger(path, lineage="other notes") as other:
        assert other.spent() == 0.0


def test_facts_cannot_replace_what_the_ledger_itself_records(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        ledger.reserve(CHARGE, task="t", lineage="elsewhere", delta=0.1, epsilon_after=0.0)
        assert ledger.history() == CHARGE
        assert ledger.entries()[0].body["epsilon_after"] == ledger.spent()


# --- one reply a task --------------------------------------------------------------------------


def test_a_committed_task_has_its_reply_and_no_other_task_has(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        ledger.burn(reserve(ledger), "TRAINING_FAILED")
        reserve(ledger)
        assert ledger.reply("t") is None  # BURNED and RESERVED have none
        ledger.commit(reserve(ledger), b"first", result="hash")
        assert ledger.entries()[-1].body["result"] == "hash"
    with open_ledger(path) as ledger:
        assert ledger.reply("t") == b"first"
        assert ledger.reply("another") is None
    with open_ledger(path, lineage="other notes") as other:
        assert other.reply("t") is None


def test_a_task_is_answered_once_and_a_reservation_closes_once(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        one, two = reserve(ledger), reserve(ledger)
        ledger.commit(one, b"one")
        with pytest.raises(LedgerError, match="answered under another reservation"):
            ledger.commit(two, b"two")
        with pytest.raises(LedgerError, match="reservation 1 is closed already"):
            ledger.burn(one, "INTERNAL")
        ledger.burn(two, "INTERNAL")
        with pytest.raises(LedgerError, match="reservation 2 is closed already"):
            ledger.burn(two, "INTERNAL")
        assert ledger.reply("t") == b"one"
        assert [e.state for e in ledger.entries()] == ["RESERVED"] * 2 + ["COMMITTED", "BURNED"]


def test_old_replies_are_dropped_and_their_tasks_cost_again(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "l.sqlite") as ledger:
        for number in range(6):
            ledger.commit(reserve(ledger, str(number)), b"%d" % number)
        found = [ledger.reply(str(number)) for number in range(6)]
        assert found == [None, None, b"2", b"3", b"4", b"5"]
        ledger.commit(reserve(ledger, "0"), b"anew")
        assert ledger.reply("0") == b"anew"
        assert ledger.verify() == 14


def test_one_process_at_a_time_has_its_turn_and_readers_do_not_wait(tmp_path: Path) -> None:
    path, order = tmp_path / "l.sqlite", []

    def second() -> None:
        with open_ledger(path) as other, other.turn():
            order.append(f"second found {other.reply('t')!r}")

    with open_ledger(path) as ledger, ledger.turn():
        reservation = reserve(ledger)
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.3)
        with open_ledger(path) as reader:
            assert reader.verify() == 1
        ledger.commit(reservation, b"reply")
        order.append("first")
    waiting.join(timeout=10)
    assert order == ["first", "second found b'reply'"]


# --- tampering ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET body = '{}'",
        "DELETE FROM entry",
        "UPDATE reply SET content = x'00'",
    ],
)
def test_nothing_can_be_changed_through_sql(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        ledger.commit(reserve(ledger), b"reply")
    with (
        sqlite3.connect(path) as db,
        pytest.raises(sqlite3.DatabaseError, match=r"append-only|one reply"),
    ):
        db.execute(statement)


def tamper(path: Path, *statements: str) -> None:
    """Change a ledger file as someone who may write it would."""
    with sqlite3.connect(path) as db:
        for trigger in ("no_update", "no_delete", "no_other_reply"):
            db.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            db.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entry SET body = replace(body, '4.0', '9.0') WHERE seq = 1",
        "UPDATE entry SET state = 'BURNED' WHERE seq = 2",
        "DELETE FROM entry WHERE seq = 1",
        "DELETE FROM entry WHERE seq = 2",
    ],
)
def test_tampering_with_the_file_breaks_the_chain(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        for _ in range(3):
            reserve(ledger)
    tamper(path, statement)
    with open_ledger(path) as ledger, pytest.raises(LedgerError, match="chain breaks"):
        reserve(ledger)


def test_a_reply_that_was_changed_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with open_ledger(path) as ledger:
        ledger.commit(reserve(ledger), b"reply")
    tamper(path, "UPDATE reply SET content = x'00'")
    with open_ledger(path) as ledger, pytest.raises(LedgerError, match="reply of entry 2 was cha"):
        ledger.reply("t")


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
        "l.turn().acquire();"
        "l.reserve((GaussianSteps(1.0, 4.0, 2),), task='t', run='r', round=1);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ, check=False)
    assert ended.returncode == -signal.SIGKILL
    with open_ledger(path) as ledger, ledger.turn():  # a dead process has no turn
        assert ledger.history() == CHARGE
        assert ledger.verify() == 1
        ledger.commit(reserve(ledger), b"reply")
