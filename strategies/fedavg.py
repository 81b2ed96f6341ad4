"""FedAvg on the factors: mean of A and mean of B, separately (FedIT, arXiv 2305.05644).

Kept as the baseline to beat. It is biased: mean(B) mean(A) differs from mean(B A) by exactly
sum_k w_k (B_k - mean B)(A_k - mean A); the merge reports that difference.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.adapter import Adapter
from strategies.base import Merge, check, discrepancy, factor_means, product_means


class FedAvg:
    """Mean of each factor on its own."""

    name = "fedavg"
    exact = False

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merge:
        """See ``Strategy.merge``. Raises MergeError when specs or layers differ."""
        spec = check(adapters, weights)
        naive = factor_means(adapters, weights)
        gap = discrepancy(naive, product_means(adapters, weights))
        return Merge(Adapter.from_deltas(naive, spec), gap, 1.0)
