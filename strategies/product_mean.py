"""Exact weighted mean in product space: dW = sum_k w_k scale B_k A_k.

The mean of K products has rank up to K r; it is re-factorised to rank r by an exact SVD, which is
the best approximation in Frobenius norm. When all hospitals share A nothing is lost at all.
Reference: the aggregation of FlexLoRA (arXiv 2402.11505) without its per-client ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.adapter import Adapter
from adapters.lowrank import svd
from strategies.base import Merge, check, discrepancy, factor_means, product_means


class ProductMean:
    """Mean of the products, then the best approximation of the adapters' rank."""

    name = "product_mean"
    exact = True

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merge:
        """See ``Strategy.merge``. Raises MergeError when specs or layers differ."""
        spec = check(adapters, weights)
        means = product_means(adapters, weights)
        parts = {name: svd(mean) for name, mean in means.items()}
        merged = Adapter.from_deltas({n: p.truncate(spec.rank) for n, p in parts.items()}, spec)
        kept = min(p.kept_energy(spec.rank) for p in parts.values())
        return Merge(merged, discrepancy(factor_means(adapters, weights), means), kept)
