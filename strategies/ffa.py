"""FFA-LoRA (arXiv 2403.12313): A is frozen and shared, so the mean of B is the exact mean.

With A fixed dW is linear in B; the noise of a private step stays linear too, instead of
multiplying itself.
"""

from __future__ import annotations

from typing import ClassVar

from adapters.lowrank import LowRank
from strategies.base import Declaration, MergeError
from strategies.streaming import Stream, Streaming
from strategies.sums import FactorSums


class FFA(Streaming):
    """Mean of B under a shared A."""

    name: ClassVar[str] = "ffa"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2403.12313",
        exact=True,
        sums=True,
        streams=True,
        trains=("B", "core"),
    )

    def stream(self) -> Stream:
        """See ``Streaming.stream``. Raises MergeError when the hospitals' A differ."""
        sums = FactorSums()
        return Stream(sums.add, lambda: self.merged(sums))

    def merged(self, sums: FactorSums) -> dict[str, LowRank]:
        """Mean of B and the shared A, bit for bit, by layer."""
        mean = sums.under_shared("A")
        if mean is None:
            raise MergeError(f"{self.name} needs the same A in all; use product_mean")
        return mean
