"""FedSVD (arXiv 2505.12805): the exact mean of B under a shared A, then both factors from its SVD.

scale mean(B) A = U S Vh becomes B = U S, A = Vh. The product is unchanged, so this is pure
post-processing; but the next round trains B against the directions that matter, and A keeps
orthonormal rows, which bounds the gradient of B by that of dW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapters.adapter import Adapter
from adapters.lowrank import svd
from strategies.base import Declaration, Draw, Update
from strategies.ffa import FFA


class FedSVD(FFA):
    """Mean of B under a shared A, re-factorised so that A has orthonormal rows."""

    name: ClassVar[str] = "fedsvd"
    declared: ClassVar = Declaration(
        space="factors", paper="arXiv 2505.12805", exact=True, sums=True, trains=("B",)
    )

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when the hospitals' A differ."""
        rank = adapters[0].spec.rank
        return {n: svd(d).truncate(rank) for n, d in self.mean(adapters, weights).items()}
