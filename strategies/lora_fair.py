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
from torch import Tensor

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from strategies.base import EVERY_PART, Declaration, Draw, Strategy, Update
from strategies.sums import FactorSums, ProductMeans


class LoraFair(Strategy):
    """Mean of A, and the B that under it comes nearest to the exact mean."""

    name: ClassVar[str] = "lora_fair"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2411.14961",
        streams=True,
        keeps=frozenset({"one", "equal", "scale"}),
        trains=(*EVERY_PART, "core"),
    )
    ridge: Annotated[float, Field(gt=0, le=100)] = 0.01  # c over the mean squared row norm of A

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when ranks differ."""
        factors, products = FactorSums(), ProductMeans()
        for adapter, weight in zip(adapters, weights, strict=True):
            factors.add(adapter, weight)
            products.add(adapter, weight)
        exact = products.take()
        return {
            name: LowRank(self._corrected(mean, exact.pop(name)), mean.A)
            for name, mean in factors.means().items()
        }

    def _corrected(self, mean: LowRank, exact: Update) -> Tensor:
        """B' of the module's formula, (m, r)."""
        A = mean.A
        gram = A @ A.T
        seen = exact.B @ (exact.A @ A.T) if isinstance(exact, LowRank) else exact @ A.T
        c = max(self.ridge * float(gram.trace()) / len(A), torch.finfo(gram.dtype).tiny)
        penalty = c * torch.eye(len(A), dtype=gram.dtype)
        return mean.B + torch.linalg.solve(gram + penalty, (seen - mean.B @ gram).T).T
