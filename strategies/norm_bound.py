"""Norm bounding (Sun et al., arXiv 1911.07963): no hospital's update counts for more than a bound.

The bound is a multiple of the median norm, so that it needs no knowledge of scale. What is longer
is shortened to it; then the mean is taken. One hospital that lies moves the mean by a bounded step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update
from strategies.directions import Scope, norms
from strategies.sums import ProductSums


class NormBound(Strategy):
    """Mean of updates that are no longer than a multiple of the median norm.

    It goes through the hospitals twice: once for their norms, once for the mean.
    """

    name: ClassVar[str] = "norm_bound"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 1911.07963", streams=True)
    scope: Scope = "layer"
    multiple: Annotated[float, Field(ge=1, le=100)] = 1.0  # of the median norm

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        sizes = [norms(adapter, self.scope) for adapter in adapters]
        bounds = {n: self.multiple * statistics.median_low(s[n] for s in sizes) for n in sizes[0]}
        sums = ProductSums()
        for adapter, weight, size in zip(adapters, weights, sizes, strict=True):
            shorter = {n: min(1.0, bounds[n] / s) if s else 1.0 for n, s in size.items()}
            sums.add(adapter, {n: weight * factor for n, factor in shorter.items()})
        return sums.take()
