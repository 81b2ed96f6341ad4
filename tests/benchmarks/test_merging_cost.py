"""The error that the benchmark states is that of the merged product, vectors and all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import LowRank
from benchmarks.merging import cost

WEIGHTS = [0.5, 0.3, 0.2]


def adapters() -> list[Adapter]:
    g = torch.Generator().manual_seed(0)
    spec = AdapterSpec(16, 16.0, ("layer",))
    return [
        Adapter(
            spec,
            {"layer": LowRank(torch.randn(90, 16, generator=g), torch.randn(16, 70, generator=g))},
        )
        for _ in WEIGHTS
    ]


def test_ours_is_the_best_of_its_rank() -> None:
    assert cost._error(adapters(), WEIGHTS) < 1e-12


@pytest.mark.parametrize(
    "spoil",
    [
        lambda B: B.roll(1, 0),  # of the same singular values, with other vectors
        lambda B: B * (1 + 1e-9),
    ],
)
def test_what_is_not_the_best_is_seen(
    spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = cost.merge

    def spoiled(*args: Any, **options: Any) -> Any:
        found = merge(*args, **options)
        layers = {n: LowRank(spoil(x.B), x.A) for n, x in found.adapter.layers.items()}
        return replace(found, adapter=Adapter(found.adapter.spec, layers))

    monkeypatch.setattr(cost, "merge", spoiled)
    assert cost._error(adapters(), WEIGHTS) > 1e-10
