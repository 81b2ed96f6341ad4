"""SIGKILL at any instant: the ledger verifies, never under-reports, and gives one reply a task."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.serde import recorddict_to_proto

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client import training
from client.privacy.accountant import epsilon
from client.privacy.chain import Entry
from client.privacy.ledger import Ledger
from client.training import Outgoing
from conf.policy import SitePolicy
from transport.wire import pack_result

ROOT = Path(__file__).parents[3]
MakePlan = Callable[..., TrainingPlan]
MakePolicy = Callable[..., SitePolicy]
Worker = Callable[..., tuple[int, dict[str, float]]]
KILLED = -signal.SIGKILL
ATTEMPTS = 5  # under one ledger: so many histories the worker has prepared for


class Site:
    """One hospital with an empty ledger, its anchor elsewhere, and all that was ever sent."""

    def __init__(self, folder: Path, policy: SitePolicy, task: str, work: Worker) -> None:
        folder.mkdir()
        self.folder, self.task, self._work = folder, task, work
        paths = {"ledger": folder / "l.sqlite", "anchor": folder / "other disk" / "anchor"}
        self.policy = policy.model_copy(update=paths)
        self.file = folder / "site.yaml"
        self.file.write_text(yaml.safe_dump(self.policy.model_dump(mode="json")))
        self.attempts = 0

    def attempt(
        self, delay: tuple[str, float] | None = None, point: Any = None
    ) -> tuple[int, dict[str, float]]:
        """Ask the task of a process that dies after ``delay`` or at ``point``, or not at all.

        ``delay`` is in seconds since the process's "start", or since the first "draw" of a sample;
        so is how long it lived.
        """
        self.attempts += 1
        sent = self.folder / f"sent-{self.attempts}"
        return self._work(site=str(self.file), sent=str(sent), delay=delay, point=point)

    def check(self) -> list[Entry]:
        """What must hold after every death; returns the ledger's entries."""
        drawn = len(list(self.folder.glob("*.drawn")))
        sent = [file.read_bytes() for file in sorted(self.folder.glob("sent-*"))
                if file.suffix != ".drawn"]  # fmt: skip
        if not self.policy.ledger.exists():
            assert (drawn, sent) == (0, [])
            return []
        with Ledger.of(self.policy) as ledger:
            entries = ledger.entries()  # chain, MACs and anchor are sound
            assert [e.state for e in entries].count("RESERVED") >= drawn
            assert [e.state for e in entries].count("COMMITTED") <= 1
            assert ledger.spent() == epsilon(ledger.history(), ledger.delta) <= ledger.budget
            assert sum(m.steps for m in ledger.history()) >= 2 * drawn
            if not any(sent):
                return entries
            committed = [e for e in entries if e.state == "COMMITTED"]
            charge = entries[committed[0].body["reservation"] - 1]
            assert charge.body["task"] == self.task
            content = ledger.reply(self.task)
        assert content is not None
        stored = Outgoing.from_bytes(content)
        assert stored.facts["epsilon_spent"] == charge.body["epsilon_after"]
        reply = recorddict_to_proto(pack_result(stored.tensors, stored.facts))
        wire = reply.SerializeToString(deterministic=True)
        assert all(wire.startswith(part) for part in sent)  # a part of it, where death cut it off
        return entries


@pytest.fixture(scope="module")
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.communicate()  # the end of its input ends it


@pytest.fixture
def site(
    workers: list[subprocess.Popen[str]],
    policy: MakePolicy,
    plan: MakePlan,
    starting_point: tuple[Adapter, str],
    tmp_path: Path,
) -> Callable[[], Site]:
    """Hospitals to be killed; the worker's parent is started once, with everything imported."""
    task = training._task(plan(), starting_point[0])
    if not workers:
        file = tmp_path / "warm.yaml"
        file.write_text(yaml.safe_dump(policy().model_dump(mode="json")))
        (tmp_path / "plan.json").write_text(plan().model_dump_json())
        starting_point[0].save(tmp_path / "start")
        script = str(Path(__file__).with_name("crash_worker.py"))
        arguments = [str(tmp_path / "plan.json"), str(tmp_path / "start"), str(file), str(ATTEMPTS)]
        process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        workers.append(process)

    def work(**order: Any) -> tuple[int, dict[str, float]]:
        pipe = workers[0]
        assert pipe.stdin
        assert pipe.stdout
        pipe.stdin.write(json.dumps(order) + "\n")
        pipe.stdin.flush()
        status, lived = json.loads(pipe.stdout.readline())
        return status, lived

    count = iter(range(1000))
    return lambda: Site(tmp_path / f"site {next(count)}", policy(), task, work)


def kill_at_random(site: Callable[[], Site], kills: int) -> None:
    """Kill so many processes, a few under each ledger, and let each ledger answer in the end.

    Half of the instants are after the first draw, for most of a process's life is before it.
    """
    draw = random.Random()
    honest = site()
    longest = honest.attempt()[1]
    assert [e.state for e in honest.check()] == ["RESERVED", "COMMITTED"]
    states: set[str] = set()
    while kills > 0:
        east = site()
        for _ in range(ATTEMPTS - 1):
            since = draw.choice(["start", "draw"])
            status, _ = east.attempt(delay=(since, draw.uniform(0, longest[since])))
            assert status in (KILLED, 0)
            kills -= status == KILLED
            states.add(" ".join(e.state for e in east.check()))
        assert east.attempt()[0] == 0
        entries = east.check()
        assert east.attempt()[0] == 0
        assert east.check() == entries  # answered again, at no charge
        first, again = (east.folder / f"sent-{n}" for n in (ATTEMPTS, ATTEMPTS + 1))
        assert first.read_bytes() == again.read_bytes()
        assert entries[-1].state == "COMMITTED"
    assert len(states) > 2  # the instants were not all of one kind


def test_a_process_killed_at_20_random_instants(site: Callable[[], Site]) -> None:
    kill_at_random(site, 20)


@pytest.mark.slow
def test_a_process_killed_at_200_random_instants(site: Callable[[], Site]) -> None:
    kill_at_random(site, 200)


@pytest.mark.parametrize(
    ("point", "left", "charges"),
    [
        (("durable", "create", 1, "before"), [], 1),  # no key yet
        (("durable", "create", 1, "after"), [], 1),
        (("LedgerFile", "append", 1, "after"), [], 1),  # in the transaction: it never was
        (("Anchor", "write", 1, "before"), ["RESERVED"], 2),  # between the two writes
        (("durable", "to_disk", 2, "before"), ["RESERVED"], 2),  # the anchor's name not on disk yet
        (("Anchor", "write", 1, "after"), ["RESERVED"], 2),
        (("Ledger", "commit", 1, "before"), ["RESERVED"], 2),  # trained, and lost
        (("LedgerFile", "append", 2, "after"), ["RESERVED"], 2),  # committed without its reply: no
        (("LedgerFile", "store_reply", 1, "after"), ["RESERVED"], 2),
        (("Anchor", "write", 2, "before"), ["RESERVED", "COMMITTED"], 1),  # between the two writes
        (("Anchor", "write", 2, "after"), ["RESERVED", "COMMITTED"], 1),
        (("Ledger", "commit", 1, "after"), ["RESERVED", "COMMITTED"], 1),  # and nothing was sent
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_process_killed_exactly_between_two_writes(
    site: Callable[[], Site], point: tuple[Any, ...], left: list[str], charges: int
) -> None:
    east = site()
    assert east.attempt(point=point)[0] == KILLED
    assert [e.state for e in east.check()] == left
    for _ in range(2):  # it answers, and answers again
        assert east.attempt()[0] == 0
        states = [e.state for e in east.check()]
        assert states == ["RESERVED"] * charges + ["COMMITTED"]


def test_two_processes_with_one_task_send_the_same_bytes(
    site: Callable[[], Site],
) -> None:
    """The one whose turn it is not waits, then finds the other's reply."""
    east = site()
    with Ledger.of(east.policy) as ledger:
        turn = ledger.turn()
        turn.__enter__()  # as a process that trains
        status, lived = east.attempt(delay=("start", 1.0))
        assert (status, east.check()) == (KILLED, [])  # it was still waiting
        assert lived["start"] >= 1.0
        turn.__exit__(None, None, None)
    assert east.attempt()[0] == 0
    assert [e.state for e in east.check()] == ["RESERVED", "COMMITTED"]
