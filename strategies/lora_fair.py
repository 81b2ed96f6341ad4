"""LoRA-FAIR (arXiv 2411.14961): FedAvg's mean A is kept, and the mean B corrected towards the mean.

    B' = mean(B) + dB,   dB = argmin |(mean(B) + dB) mean(A) - M|^2 + c |dB|^2,   M = mean(B A)
       = mean(B) + (M - mean(B) mean(A)) mean(A)^T (mean(A) mean(A)^T + c I)^-1

The paper measures the gap by cosine and descends; here it is least squares, in closed form. The
shared A is what the next round starts from, so what the rows of mean(A) do not span stays lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from strategies.base import EVERY_PART, Declaration, Draw, Strategy, Update, deltas, factor_means


class LoraFair(Strategy):
    """Mean of A, and the B that under it comes nearest to the exact mean."""

    name: ClassVar[str] = "lora_fair"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2411.14961",
        keeps=frozenset({"one", "equal", "scale"}),
        trains=(*EVERY_PART, "core"),
    )
    ridge: Annotated[float, Field(gt=0, le=100)] = 0.01  # c over the mean squared row norm of A

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when ranks differ."""
        merged: dict[str, Update] = {}
        updates = deltas(adapters)
        for name, mean in factor_means(adapters, weights).items():
            A = mean.A
            gap = -mean.B @ (A @ A.T)  # (M - mean(B) mean(A)) A^T, and nothing of size m x n
            for w, part in zip(weights, updates[name], strict=True):
                gap += w * part.B @ (part.A @ A.T)
            gram = A @ A.T
            c = max(self.ridge * float(gram.trace()) / len(A), torch.finfo(gram.dtype).tiny)
            penalty = c * torch.eye(len(A), dtype=gram.dtype)
            merged[name] = LowRank(mean.B + torch.linalg.solve(gram + penalty, gap.T).T, A)
        return merged
