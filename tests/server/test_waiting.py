"""How many hospitals a round waits for, and how long; nobody is asked in vain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from flwr.app import Message

from conf.schema import TrainingSettings
from server.rounds import RoundFailed
from server.run_folder import RunFolder
from tests.server.test_rounds import go

if TYPE_CHECKING:
    from conftest import LocalGrid

Answer = Callable[[Message], Message | None]
Settings = Callable[..., TrainingSettings]
Grids = type["LocalGrid"]


def test_too_few_hospitals_are_waited_for_and_not_longer_than_allowed(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder
) -> None:
    federation = {"timeout_s": 0.1}
    grid = local_grid({11: honest[11]})
    with pytest.raises(RoundFailed, match="hospitals connected in time: 1, needed: 2"):
        go(grid, settings(federation=federation), folder)
    assert grid.asked == []


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"name": "slerp"}, "round 1: 3 hospitals are connected, and slerp merges two"),
        ({"name": "krum"}, "connected in time: 3, needed: 5"),
        ({"name": "trimmed_mean", "liars": 2}, "connected in time: 3, needed: 5"),
        ({"name": "lines", "of": "krum"}, "connected in time: 3, needed: 5"),
        (
            {"name": "lines", "blocks": 1},
            "block 1 is adapted, strategy.blocks=1; nothing was asked",
        ),
    ],
)
def test_nobody_is_asked_for_a_round_that_could_not_be_merged(
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
    strategy: dict[str, Any],
    said: str,
) -> None:
    grid = local_grid(honest)
    with pytest.raises(RoundFailed, match=said):
        go(grid, settings(strategy=strategy, federation={"timeout_s": 0.1}), folder)
    assert grid.asked == []


def test_a_rule_waits_for_as_many_as_it_needs_and_they_have_the_whole_time_to_answer(
    local_grid: Grids, honest: dict[int, Answer], settings: Settings, folder: RunFolder
) -> None:
    """``median`` needs a third hospital, which comes when most of the time is over."""
    began = time.monotonic()

    class Late(local_grid):  # type: ignore[misc, valid-type]
        def get_nodes(self) -> Any:
            nodes = list(super().get_nodes())
            return nodes if time.monotonic() - began > 2.0 else nodes[:2]

        def pull_messages(self, ids: Any) -> Any:
            return super().pull_messages(ids) if time.monotonic() - began > 4.0 else []

    federation = {"rounds": 1, "timeout_s": 3.0}
    go(Late(honest), settings(strategy={"name": "median"}, federation=federation), folder)
    (record,) = folder.finished_rounds()
    assert (record["hospitals"], record["left_out"]) == (["east", "mid", "west"], {})
