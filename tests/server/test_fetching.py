"""A reply that cannot be decoded costs its sender the round; a failed connection is no reply."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import httpx
import pytest
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    validate_object_content,
)

from adapters.adapter import Adapter
from conf.schema import TrainingSettings
from server.rounds import federate
from server.run_folder import RunFolder

if TYPE_CHECKING:
    from conftest import LocalGrid

Answer = Callable[[Message], Message | None]
Settings = Callable[..., TrainingSettings]
Grids = type["LocalGrid"]

SITES = ("east", "mid", "west")
KEYS = {11: "east", 12: "mid", 13: "west"}


def go(grid: LocalGrid, settings: TrainingSettings, folder: RunFolder) -> Adapter:
    return federate(grid, settings, folder.create(settings), threading.Event(), lambda *_: None)


@pytest.mark.parametrize("node", [11, 12])
def test_bytes_that_flower_takes_and_cannot_decode_cost_only_their_sender(
    node: int,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = b"\xff" * 4
    rubbish = b"ConfigRecord  %d\x00%b" % (len(body), body)
    validate_object_content(rubbish)  # all that the SuperLink looks at
    pull = local_grid.pull_messages

    def pull_and_decode(grid: LocalGrid, ids: Iterable[str]) -> Iterable[Message]:
        replies = list(pull(grid, ids))  # they do not come again
        if any(grid.asked[int(i.partition("-")[2])][1] == node for i in ids):
            name = hashlib.sha256(rubbish).hexdigest()
            inflate_object_from_contents(name, {name: rubbish})
        return replies

    monkeypatch.setattr(local_grid, "pull_messages", pull_and_decode)
    go(local_grid(honest, KEYS), settings(), folder)
    for record in folder.finished_rounds():
        assert record["left_out"] == {KEYS[node]: "malformed reply"}
        assert set(record["hospitals"]) == set(SITES) - {KEYS[node]}


def test_a_connection_that_fails_is_nobodys_reply(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> Iterable[Message]:
        raise httpx.ReadError("connection reset")

    monkeypatch.setattr(local_grid, "pull_messages", broken)
    with pytest.raises(httpx.ReadError):
        go(local_grid(honest), settings(), folder)


def test_who_answered_while_another_was_slow_to_be_fetched_is_heard(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Node 12 keeps the coordinator until the time is over; node 11 is asked for before it."""
    pull, late = local_grid.pull_messages, threading.Event()
    real = time.monotonic

    def slow(grid: LocalGrid, ids: Iterable[str]) -> Iterable[Message]:
        (one,) = ids
        node = grid.asked[int(one.partition("-")[2])][1]
        if node == 12:
            late.set()
        if node == 11 and not late.is_set():
            return []  # not there yet
        return pull(grid, [one])

    monkeypatch.setattr(local_grid, "pull_messages", slow)
    monkeypatch.setattr(time, "monotonic", lambda: real() + 1e6 * late.is_set())
    wanted = settings()
    once = wanted.federation.model_copy(update={"rounds": 1})
    go(local_grid(honest, KEYS), wanted.model_copy(update={"federation": once}), folder)
    (record,) = folder.finished_rounds()
    assert record["left_out"] == {}
