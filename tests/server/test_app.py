"""The ServerApp: it runs the folder that its own machine names, and can be asked to end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flwr.app import Context, Message, RecordDict

from conf.schema import TrainingSettings
from server import app as server_app
from server.rounds import RoundFailed
from server.run_folder import RunFolder

if TYPE_CHECKING:
    from conftest import LocalGrid

Answer = Callable[[Message], Message | None]
Settings = Callable[..., TrainingSettings]
Grids = type["LocalGrid"]


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch, folder: RunFolder) -> threading.Event:
    """The event by which the app is asked to end; the environment names the run folder."""
    event = threading.Event()
    monkeypatch.setattr(server_app, "STOP", event)
    monkeypatch.setenv(server_app.RUN, str(folder.path))
    return event


def test_the_folder_is_the_one_this_machine_names_whatever_comes_with_the_run(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    stop: threading.Event,
    tmp_path: Path,
) -> None:
    folder.create(settings())
    other = str(tmp_path / "other")
    sent = Context(1, 1, {server_app.RUN: other}, RecordDict(), {server_app.RUN: other})
    server_app.app(local_grid(honest), sent)
    assert [record["round"] for record in folder.finished_rounds()] == [1, 2]
    assert folder.global_adapter().is_finite()
    assert not (tmp_path / "other").exists()


def test_the_app_ends_when_asked_to(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    stop: threading.Event,
) -> None:
    folder.create(settings())

    def silent(message: Message) -> None:
        stop.set()

    with pytest.raises(RoundFailed, match="stopped on request"):
        server_app.app(local_grid(honest | {13: silent}), Context(1, 1, {}, RecordDict(), {}))
    assert folder.finished_rounds() == []
