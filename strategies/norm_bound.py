"""Norm bounding (Sun et al., arXiv 1911.07963): no hospital's update counts for more than a bound.

The bound is a multiple of the median norm (of an even number, the smaller of the middle two), so
that it needs no knowledge of scale. What is longer is shortened to it; then the mean is taken. As
long as no more than half of the hospitals lie, none counts for more than the multiple of the
longest honest update. Those that learned nothing count too: without them one liar would set the
bound. So where at least half learned nothing, nothing is merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update
from strategies.norms import Scope, combination, inverse, norms_of


class NormBound(Strategy):
    """Mean of updates that are no longer than a multiple of the median norm."""

    name: ClassVar[str] = "norm_bound"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 1911.07963", streams=True)
    multiple: Annotated[float, Field(ge=1, le=100)] = 1.0  # of the median norm
    scope: Scope = "layer"  # what counts as one vector

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        w = torch.tensor(list(weights), dtype=torch.float64)
        coefficients = {}
        for name, size in norms_of(adapters, self.scope).items():
            bound = self.multiple * size.median()
            coefficients[name] = w * torch.where(size > bound, bound * inverse(size), 1.0)
        return combination(adapters, coefficients)
