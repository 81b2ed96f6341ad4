"""FFA-LoRA (arXiv 2403.12313): A is frozen and shared, so the mean of B is the exact mean.

With A fixed dW is linear in B; the noise of a private step stays linear too, instead of
multiplying itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapters.adapter import Adapter
from adapters.lowrank import LowRank
from strategies.base import Declaration, Draw, MergeError, Strategy, Update, mean_under_shared


class FFA(Strategy):
    """Mean of B under a shared A."""

    name: ClassVar[str] = "ffa"
    declared: ClassVar = Declaration(
        space="factors", paper="arXiv 2403.12313", exact=True, sums=True, trains=("B", "core")
    )

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when the hospitals' A differ."""
        return self.mean(adapters, weights)

    def mean(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
        """Mean of B and the shared A, bit for bit, by layer."""
        mean = mean_under_shared(adapters, weights, "A")
        if mean is None:
            raise MergeError(f"{self.name} needs the same A from every hospital; use product_mean")
        return mean
