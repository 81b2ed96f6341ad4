"""FedSVD (arXiv 2505.12805): the exact mean of B under a shared A, then both factors from its SVD.

scale mean(B) A = U S Vh becomes B = U S, A = Vh. The product is unchanged, so this is pure
post-processing; but the next round trains B against the directions that matter, and A keeps
orthonormal rows, which bounds the gradient of B by that of dW.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.adapter import Adapter
from adapters.lowrank import svd
from strategies.base import Merge
from strategies.ffa import FFA


class FedSVD(FFA):
    """Mean of B under a shared A, re-factorised so that A has orthonormal rows."""

    name = "fedsvd"
    exact = True

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merge:
        """See ``Strategy.merge``. Raises MergeError when the hospitals' A differ."""
        mean = super().merge(adapters, weights).adapter
        spec = mean.spec
        turned = {name: svd(delta).truncate(spec.rank) for name, delta in mean.deltas().items()}
        return Merge(Adapter.from_deltas(turned, spec), 0.0, 1.0)
