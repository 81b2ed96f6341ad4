"""RoLoRA (arXiv 2409.02346): a round moves only one factor, B and A in turn; its mean is exact.

Under a shared A the mean of B A is (mean B) A, under a shared B it is B (mean A): which of the two
a round was is seen from the adapters. Both factors learn, yet the noise of a step stays linear.
"""

from __future__ import annotations

from typing import ClassVar

from adapters.lowrank import LowRank
from strategies.base import Declaration, MergeError
from strategies.streaming import Stream, Streaming
from strategies.sums import FactorSums


class RoLoRA(Streaming):
    """Mean of the factor that moved, under the other, which all hospitals share."""

    name: ClassVar[str] = "rolora"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2409.02346",
        exact=True,
        sums=True,
        streams=True,
        trains=("B", "A", "alternate"),
    )

    def stream(self) -> Stream:
        """See ``Streaming.stream``. Raises MergeError when the hospitals share neither factor."""
        sums = FactorSums()
        return Stream(sums.add, lambda: self.merged(sums))

    def merged(self, sums: FactorSums) -> dict[str, LowRank]:
        """The mean under whichever factor is shared, that one bit for bit."""
        for mean in (sums.under_shared("A"), sums.under_shared("B")):
            if mean is not None:
                return mean
        raise MergeError(f"{self.name} needs the same A or the same B in all")
