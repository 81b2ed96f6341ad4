"""Model Stock (arXiv 2403.19522): as far from the base as the hospitals agree.

    t = K c / (1 + (K - 1) c),   c the mean cosine of pairs;   t times the mean

The geometry is that of updates scattered evenly around the one that is sought. For more than two
the paper has one angle for all pairs; their mean stands for it. t is kept within [0, 1]: opposed
updates would have turned the sign. Norms never enter, so small updates are no special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from strategies.base import Declaration, Update
from strategies.directions import Directions, Scope
from strategies.streaming import Stream, Streaming


class ModelStock(Streaming):
    """The mean, shortened by how much the updates disagree."""

    name: ClassVar[str] = "model_stock"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 2403.19522", streams=True)
    scope: Scope = "layer"

    def stream(self) -> Stream:
        """See ``Streaming.stream``."""
        sums = Directions(self.scope, weighted=False)
        return Stream(sums.add, lambda: self.merged(sums))

    def merged(self, sums: Directions) -> Mapping[str, Update]:
        """By layer: t times the mean; c is 0 between an update that is zero and any other."""
        k = sums.count
        lengths = sums.take_directions()[1]
        means = sums.take_means()
        if k == 1:
            return means
        for name, length in lengths.items():
            c = (length**2 - sums.learned[name]) / (k * (k - 1))
            t = k * c / (1 + (k - 1) * c) if c > 0 else 0.0
            means[name] = means[name] * min(t, 1.0)
        return means
