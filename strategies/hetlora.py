"""HetLoRA (arXiv 2401.06432): factors of different ranks, zero-padded and averaged by norm.

    p_k = w_k |dW_k| / sum_j w_j |dW_j|   for each layer
    B = sum_k p_k [s_k B_k, 0],   A = sum_k p_k [A_k; 0]   at the largest rank

Kept as a baseline for ranks that differ: like FedAvg it is biased, by exactly
sum_k p_k (B_k - B)(A_k - A) of the padded factors, and (B G, G^-1 A) merges to something else
than (B, A). Long updates count for more, and under noise those are the noisy ones.
The paper cuts the result by dropping columns; here it is cut to the output rank by SVD, which no
cut beats. A hospital that prunes its own rank by its data would tell of them; ours do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from strategies.base import EVERY_PART, Declaration, Update
from strategies.streaming import Stream, Streaming

_LEAST = 1e-150  # norm of an update of zero: beside another it counts for nothing


class HetLoRA(Streaming):
    """Mean of padded factors, each hospital weighted by the norm of its update."""

    name: ClassVar[str] = "hetlora"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2401.06432",
        ranks=True,
        streams=True,
        keeps=frozenset({"one", "equal", "scale"}),
        trains=(*EVERY_PART, "core"),
    )

    def stream(self) -> Stream:
        """See ``Streaming.stream``."""
        sums = _PaddedSums()
        return Stream(sums.add, sums.means)


class _PaddedSums:
    """sum_k p_k s_k B_k and sum_k p_k A_k by layer, at the largest rank so far, and sum_k p_k."""

    def __init__(self) -> None:
        self._factors: dict[str, LowRank] = {}
        self._shares: dict[str, float] = {}

    def add(self, adapter: Adapter, weight: float) -> None:
        for name, layer in adapter.layers.items():
            part = layer.to(torch.float64) * adapter.spec.scale
            share = weight * max(part.norm(), _LEAST)
            old = self._factors.get(name, LowRank(part.B[:, :0], part.A[:0]))
            rank = max(old.rank, part.rank)
            total, own = _padded(old, rank), _padded(part, rank)
            self._factors[name] = LowRank(total.B + share * own.B, total.A + share * own.A)
            self._shares[name] = self._shares.get(name, 0.0) + share

    def means(self) -> Mapping[str, Update]:
        return {
            name: LowRank(total.B / self._shares[name], total.A / self._shares[name])
            for name, total in self._factors.items()
        }


def _padded(part: LowRank, rank: int) -> LowRank:
    (m, n), more = part.shape, rank - part.rank
    if not more:
        return part
    return LowRank(
        torch.cat([part.B, part.B.new_zeros(m, more)], 1),
        torch.cat([part.A, part.A.new_zeros(more, n)]),
    )
