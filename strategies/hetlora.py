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

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from strategies.base import EVERY_PART, Declaration, Draw, Strategy, Update, deltas


class HetLoRA(Strategy):
    """Mean of padded factors, each hospital weighted by the norm of its update."""

    name: ClassVar[str] = "hetlora"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2401.06432",
        keeps=frozenset({"one", "equal", "scale"}),
        trains=(*EVERY_PART, "core"),
    )

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        merged = {}
        for name, parts in deltas(adapters).items():
            sizes = [w * part.norm() for w, part in zip(weights, parts, strict=True)]
            total = sum(sizes)
            shares = [size / total for size in sizes] if total else weights
            rank = max(part.rank for part in parts)
            (m, n), kind = parts[0].shape, parts[0].B.dtype
            B, A = torch.zeros(m, rank, dtype=kind), torch.zeros(rank, n, dtype=kind)
            for share, part in zip(shares, parts, strict=True):
                B[:, : part.rank] += share * part.B
                A[: part.rank] += share * part.A
            merged[name] = LowRank(B, A)
        return merged
