"""FedAvg on the factors: mean of A and mean of B, separately (FedIT, arXiv 2305.05644).

Kept as the baseline to beat. It is biased: mean(B) mean(A) differs from mean(B A) by exactly
sum_k w_k (B_k - mean B)(A_k - mean A); every merge reports that difference.
"""

from __future__ import annotations

from typing import ClassVar

from strategies.base import EVERY_PART, Declaration
from strategies.streaming import Stream, Streaming
from strategies.sums import FactorSums


class FedAvg(Streaming):
    """Mean of each factor on its own."""

    name: ClassVar[str] = "fedavg"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2305.05644",
        sums=True,
        streams=True,
        keeps=frozenset({"one", "equal"}),
        trains=(*EVERY_PART, "core"),
    )

    def stream(self) -> Stream:
        """See ``Streaming.stream``. Raises MergeError when ranks differ."""
        sums = FactorSums()
        return Stream(sums.add, sums.means)
