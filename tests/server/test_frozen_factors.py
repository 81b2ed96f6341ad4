"""What a round freezes comes back as it was, and what the next freezes has no size of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from flwr.app import Message

from adapters.adapter import Adapter
from conf.schema import TrainingSettings
from server.run_folder import RunFolder
from tests.server.test_rounds import go

if TYPE_CHECKING:
    from conftest import LocalGrid

Answer = Callable[[Message], Message | None]
Settings = Callable[..., TrainingSettings]
Grids = type["LocalGrid"]


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("median", "A"),
        ("task_arithmetic", "A"),
        ("ties", "A"),
        ("karcher", "A"),
        ("lines", "A"),
        ("knots", "A"),
        ("median", "B"),
        ("median", "alternate"),
        ("ties", "alternate"),
    ],
)
def test_what_the_next_round_freezes_is_orthonormal_where_a_rule_factorises_again(
    name: str,
    train: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
) -> None:
    """A frozen factor as small as what was learned so far would make every step as short."""
    go(local_grid(honest), settings(strategy={"name": name}, adapter={"train": train}), folder)
    for number in range(3):
        adapter = Adapter.load(folder.adapter_folder(number))
        frozen = "A" if train == "B" or (train == "alternate" and number % 2 == 0) else "B"
        for layer in adapter.layers.values():
            rows = layer.A if frozen == "A" else layer.B.T
            assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-5)


@pytest.mark.parametrize("train", ["A", "alternate"])
@pytest.mark.parametrize(
    "name", ["product_mean", "rolora", "norm_bound", "norm_weighted", "model_stock"]
)
def test_a_frozen_factor_stays_what_it_was(
    name: str,
    train: str,
    local_grid: Grids,
    honest: dict[int, Answer],
    settings: Settings,
    folder: RunFolder,
) -> None:
    """Bit for bit: LoRA's scale must not move from one factor to the other."""
    wanted = settings(strategy={"name": name}, adapter={"train": train}, federation={"rounds": 4})
    go(local_grid(honest), wanted, folder)
    for number in range(1, 5):
        before, after = (Adapter.load(folder.adapter_folder(n)) for n in (number - 1, number))
        frozen = "A" if train == "alternate" and number % 2 else "B"
        for layer, moved in after.layers.items():
            was = getattr(before.layers[layer], frozen)
            assert getattr(moved, frozen).equal(was)
