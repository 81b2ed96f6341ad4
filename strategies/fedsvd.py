"""FedSVD (arXiv 2505.12805): the exact mean of B under a shared A, then both factors from its SVD.

scale mean(B) A = U S Vh becomes B = U S, A = Vh. The product is unchanged, so this is pure
post-processing; but the next round trains B against the directions that matter, and A keeps
orthonormal rows, which bounds the gradient of B by that of dW.
"""

from __future__ import annotations

from typing import ClassVar

from adapters.lowrank import LowRank, svd
from strategies.base import Declaration
from strategies.ffa import FFA
from strategies.sums import FactorSums


class FedSVD(FFA):
    """Mean of B under a shared A, re-factorised so that A has orthonormal rows."""

    name: ClassVar[str] = "fedsvd"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2505.12805",
        exact=True,
        sums=True,
        streams=True,
        trains=("B",),
    )

    def merged(self, sums: FactorSums) -> dict[str, LowRank]:
        """The same product, its A with orthonormal rows."""
        return {n: svd(mean).truncate(mean.rank) for n, mean in super().merged(sums).items()}
