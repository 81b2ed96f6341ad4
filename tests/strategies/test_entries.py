"""Sparse and robust strategies make dense what they need, and no more at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from strategies.base import Draw
from strategies.registry import OURS, create

HOSPITALS, LAYERS = 5, 12


def hospitals() -> list[Adapter]:
    g = torch.Generator().manual_seed(0)
    return [
        Adapter(
            AdapterSpec(2, 4.0, ("q",)),
            {
                f"layers.{i}.q": LowRank(
                    torch.randn(9, 2, generator=g), torch.randn(2, 7, generator=g)
                )
                for i in range(LAYERS)
            },
        )
        for _ in range(HOSPITALS)
    ]


@pytest.mark.parametrize("name", [k.name for k in OURS if k.declared.space == "entries"])
def test_one_layer_of_all_hospitals_is_dense_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most, original = 0, LowRank.dense

    def counted(update: LowRank) -> Tensor:
        nonlocal most
        made = original(update)
        alive[:] = [one for one in alive if one() is not None]
        alive.append(weakref.ref(made))
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(LowRank, "dense", counted)
    gc.collect()
    strategy = create(name)
    strategy.combine(hospitals(), [1 / HOSPITALS] * HOSPITALS, Draw())
    assert 1 < most <= HOSPITALS
