"""RoLoRA (arXiv 2409.02346): a round moves only one factor, B and A in turn; its mean is exact.

Under a shared A the mean of B A is (mean B) A, under a shared B it is B (mean A): which of the two
a round was is seen from the adapters. Both factors learn, yet the noise of a step stays linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, MergeError, Strategy, Update, mean_under_shared


class RoLoRA(Strategy):
    """Mean of the factor that moved, under the other, which all hospitals share."""

    name: ClassVar[str] = "rolora"
    declared: ClassVar = Declaration(
        space="factors",
        paper="arXiv 2409.02346",
        exact=True,
        sums=True,
        trains=("B", "A", "alternate"),
    )

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``. Raises MergeError when the hospitals share neither factor."""
        for factor in ("A", "B"):
            mean = mean_under_shared(adapters, weights, factor)
            if mean is not None:
                return mean
        raise MergeError(f"{self.name} needs the same A or the same B from every hospital")
