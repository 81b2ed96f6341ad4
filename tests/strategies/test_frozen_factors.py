"""What a round froze comes out of a merge as it went in; the factor without size can be chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank, svd
from strategies.merging import merge
from strategies.registry import create
from tests.strategies.examples import dense, distance, hospitals

STREAMED = ["product_mean", "norm_bound", "norm_weighted", "model_stock", "task_arithmetic"]


def with_shared_B(count: int) -> list[Adapter]:
    """Trained in A only, all under the B of the first; LoRA's scale is 2."""
    own = hospitals(count, 3, False)
    return [
        replace(a, layers={n: LowRank(own[0].layers[n].B, x.A) for n, x in a.layers.items()})
        for a in own
    ]


@pytest.mark.parametrize("alpha", [3.0, 6.0, 5.0])
def test_one_hospital_merges_to_its_own_factors(alpha: float) -> None:
    """Not only to its product: a scale on both factors would grow one of them every round."""
    (own,) = hospitals(1, 3, False)
    own = replace(own, spec=replace(own.spec, alpha=alpha))
    merged = merge(create("product_mean"), [own], [1.0]).adapter
    for name, layer in own.layers.items():
        assert merged.layers[name].A.equal(layer.A)
        assert merged.layers[name].B.equal(layer.B)


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("name", STREAMED)
def test_a_shared_B_is_kept_bit_for_bit(name: str, weights: list[float]) -> None:
    own = with_shared_B(3)
    merged = merge(create(name), own, weights).adapter
    for layer, before in own[0].layers.items():
        assert merged.layers[layer].B.equal(before.B)
    if name == "product_mean":
        expected = {
            n: sum(w * dense(a)[n] for w, a in zip(weights, own, strict=True))
            for n in own[0].layers
        }
        assert distance(dense(merged), expected) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STREAMED[:-1])  # the last one makes them longer
def test_equal_hospitals_keep_both_factors(name: str) -> None:
    (own,) = hospitals(1, 3, False)
    merged = merge(create(name), [own] * 3, [1 / 3] * 3).adapter
    for layer, before in own.layers.items():
        assert merged.layers[layer].A.equal(before.A)
        assert torch.allclose(merged.layers[layer].B, before.B, rtol=1e-6)


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("rank", [2, 3, 12])
def test_the_orthonormal_factor_can_be_chosen(factor: str, rank: int) -> None:
    """Also where the rank exceeds that of the update, and beyond the layer's width."""
    (own,) = hospitals(1, 4, False)
    for layer in own.layers.values():
        found = svd(layer).truncate(rank, factor)  # type: ignore[arg-type]
        rows = found.A if factor == "A" else found.B.T
        free = min(rank, rows.shape[1])
        assert torch.allclose(rows[:free] @ rows[:free].T, torch.eye(free, dtype=rows.dtype))
        assert not rows[free:].any()
        assert torch.allclose(found.dense(), svd(layer).truncate(rank).dense(), atol=1e-12)
