"""RoLoRA (arXiv 2409.02346): a round moves only one factor, B and A in turn; its mean is exact.

Under a shared A the mean of B A is (mean B) A, under a shared B it is B (mean A): which of the two
a round was is seen from the adapters. Both factors learn, yet the noise of a step stays linear.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.adapter import Adapter
from strategies.base import Merge, MergeError, check, mean_under_shared


class RoLoRA:
    """Mean of the factor that moved, under the other, which all hospitals share."""

    name = "rolora"
    exact = True

    def merge(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merge:
        """See ``Strategy.merge``. Raises MergeError when the hospitals share neither factor."""
        check(adapters, weights)
        for factor in ("A", "B"):
            mean = mean_under_shared(adapters, weights, factor)
            if mean is not None:
                return Merge(mean, 0.0, 1.0)
        raise MergeError(f"{self.name} needs the same A or the same B from every hospital")
