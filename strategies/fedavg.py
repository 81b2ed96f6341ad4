"""FedAvg on the factors: mean of A and mean of B, separately (FedIT, arXiv 2305.05644).

Kept as the baseline to beat. It is biased: mean(B) mean(A) differs from mean(B A) by exactly
sum_k w_k (B_k - mean B)(A_k - mean A); every merge reports that difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapters.adapter import Adapter
from strategies.base import EVERY_PART, Declaration, Draw, Strategy, Update, factor_means


class FedAvg(Strategy):
    """Mean of each factor on its own."""

    name: ClassVar[str] = "fedavg"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2305.05644",
        sums=True,
        keeps=frozenset({"one", "equal"}),
        trains=(*EVERY_PART, "core"),
    )

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when ranks differ."""
        return factor_means(adapters, weights)
