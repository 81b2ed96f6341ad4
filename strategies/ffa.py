"""FFA-LoRA (arXiv 2403.12313): A is frozen and shared, so the mean of B is the exact mean.

With A fixed dW is linear in B; the noise of a private step stays linear too, instead of
multiplying itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.adapter import Adapter
from strategies.base import Merge, MergeError, check, mean_under_shared


class FFA:
    """Mean of B under a shared A."""

    name = "ffa"
    exact = True

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merge:
        """See ``Strategy.merge``. Raises MergeError when the hospitals' A differ."""
        check(adapters, weights)
        mean = mean_under_shared(adapters, weights, "A")
        if mean is None:
            raise MergeError(f"{self.name} needs the same A from every hospital; use product_mean")
        return Merge(mean, 0.0, 1.0)
