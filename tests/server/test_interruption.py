"""A run that ends early goes on after its last finished round and repeats nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flwr.app import Message

from adapters.adapter import Adapter
from client.privacy.ledger import Ledger
from conf.schema import TrainingSettings
from server.rounds import RoundFailed, federate
from server.run_folder import RunFolder
from transport.wire import unpack_task

if TYPE_CHECKING:
    from conftest import LocalGrid

Answer = Callable[[Message], Message | None]
Settings = Callable[..., TrainingSettings]
Grids = type["LocalGrid"]

# Full sampling, because the accountants are quick there.
PRIVATE = {"enabled": True, "clip_norm": 1.0, "sampling_rate": 1.0}


def go(grid: LocalGrid, settings: TrainingSettings, folder: RunFolder) -> Adapter:
    return federate(grid, settings, folder.create(settings), threading.Event(), lambda *_: None)


def contents(folder: RunFolder, number: int) -> dict[Path, tuple[int, bytes]]:
    files = (folder.path / "adapters" / f"round-{number:03d}").rglob("*.*")
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files if f.is_file()}


def test_a_run_that_was_interrupted_goes_on_and_repeats_nothing(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, tmp_path: Path
) -> None:
    whole = go(local_grid(honest), settings(), RunFolder(tmp_path / "whole" / "run"))

    def crash_in_round_2(message: Message) -> Message | None:
        plan, _ = unpack_task(message.content)
        if plan.round == 2:
            raise KeyboardInterrupt
        return honest[13](message)

    folder = RunFolder(tmp_path / "parts" / "run")
    with pytest.raises(KeyboardInterrupt):
        go(local_grid(honest | {13: crash_in_round_2}), settings(), folder)
    assert [record["round"] for record in folder.finished_rounds()] == [1]
    before = contents(folder, 0) | contents(folder, 1)
    assert len(before) >= 2 * 5

    grid = local_grid(honest)
    resumed = go(grid, settings(), folder)
    assert grid.asked == [(2, 11), (2, 12), (2, 13)]
    assert contents(folder, 0) | contents(folder, 1) == before
    assert [record["round"] for record in folder.finished_rounds()] == [1, 2]
    assert resumed.fingerprint() == whole.fingerprint()

    finished = local_grid(honest)
    assert go(finished, settings(), folder).fingerprint() == whole.fingerprint()
    assert finished.asked == []


def test_an_answer_that_was_lost_on_the_way_is_sent_again_and_charged_once(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    tmp_path: Path,
) -> None:
    private = settings(privacy=PRIVATE)

    answers: list[Message] = []

    def lost(message: Message) -> Message | None:
        answers.append(honest[13](message))
        raise KeyboardInterrupt

    def watched(message: Message) -> Message | None:
        answers.append(honest[13](message))
        return answers[-1]

    with pytest.raises(KeyboardInterrupt):
        go(local_grid(honest | {13: lost}), private, folder)
    go(local_grid(honest | {13: watched}), private, folder)
    first, again, last = (answer.content for answer in answers)
    assert first == again != last
    with Ledger(tmp_path / "west.sqlite", "invented", 8.0, 1e-5) as ledger:
        assert [e.body["round"] for e in ledger.entries() if e.state == "RESERVED"] == [1, 2]
        assert ledger.spent() <= 8.0


def test_a_request_to_stop_is_heard_while_waiting_for_answers_and_for_hospitals(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder
) -> None:
    for hospitals in (honest | {13: lambda _: None}, {11: honest[11]}):
        stop = threading.Event()
        stop.set()
        began = time.monotonic()
        with pytest.raises(RoundFailed, match="stopped on request"):
            federate(
                local_grid(hospitals), settings(), folder.create(settings()), stop, lambda *_: None
            )
        assert time.monotonic() - began < 30  # of 60 allowed
        assert folder.finished_rounds() == []
    assert len(go(local_grid(honest), settings(), folder).layers) == 4
