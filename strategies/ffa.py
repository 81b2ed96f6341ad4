"""FFA-LoRA (arXiv 2403.12313): A is frozen and shared, so the mean of B is the exact mean.

With A fixed dW is linear in B; the noise of a private step stays linear too, instead of
multiplying itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.adapter import Adapter
from strategies.base import Merge, MergeError, check, factor_means, shared_A


class FFA:
    """Mean of B under a shared A."""

    name = "ffa"
    exact = True

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merge:
        """See ``Strategy.merge``. Raises MergeError when the hospitals' A differ."""
        spec = check(adapters, weights)
        if not shared_A(adapters):
            raise MergeError(f"{self.name} needs the same A from every hospital; use product_mean")
        means = factor_means(adapters, weights)
        # The mean of equal A is A itself, bit for bit; recomputing it would round.
        for name, mean in means.items():
            means[name] = type(mean)(mean.B, adapters[0].layers[name].A.double())
        return Merge(Adapter.from_deltas(means, spec), 0.0, 1.0)
