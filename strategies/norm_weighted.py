"""Mean direction at the mean norm: every hospital points with its weight, however long its update.

    (sum_k w_k |dW_k|) normalised(sum_k w_k dW_k / |dW_k|)

This is what the library mergekit calls multi-SLERP. Opposed directions that cancel give the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from strategies.base import Declaration, Update
from strategies.directions import Directions, Scope
from strategies.streaming import Stream, Streaming

_BALANCED = 1e-6


class NormWeighted(Streaming):
    """Normalised mean of unit directions, times the mean norm."""

    name: ClassVar[str] = "norm_weighted"
    declared: ClassVar = Declaration(space="gram", paper="mergekit multislerp", streams=True)
    scope: Scope = "layer"

    def stream(self) -> Stream:
        """See ``Streaming.stream``."""
        sums = Directions(self.scope, weighted=True)
        return Stream(sums.add, lambda: self.merged(sums))

    def merged(self, sums: Directions) -> Mapping[str, Update]:
        """By layer: the mean direction at the mean norm, or the mean where there is none."""
        means = sums.take_means()
        directions, lengths = sums.take_directions()
        for name, length in lengths.items():
            if length >= _BALANCED * sums.weight:
                means[name] = directions[name] * (sums.mean_norm(name) / length)
        return means
