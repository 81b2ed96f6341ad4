"""Norm bounding (Sun et al., arXiv 1911.07963): no hospital's update counts for more than a bound.

The bound is a multiple of the median norm (of an even number, the smaller of the middle two), so
that it needs no knowledge of scale. What is longer is shortened to it; then the mean is taken. As
long as no more than half of the hospitals lie, none counts for more than the multiple of the
longest honest update. Those that learned nothing count too: without them one liar would set the
bound. So where at least half learned nothing, nothing is merged.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from strategies.base import Declaration
from strategies.norms import FromNorms


class NormBound(FromNorms):
    """Mean of updates that are no longer than a multiple of the median norm."""

    name: ClassVar[str] = "norm_bound"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 1911.07963", streams=True)
    multiple: Annotated[float, Field(ge=1, le=100)] = 1.0  # of the median norm

    def from_norms(self, sizes: Tensor, length: float, weights: Tensor) -> Tensor:
        """See ``FromNorms.from_norms``."""
        bound = self.multiple * sizes.median()
        return weights * torch.where(sizes > bound, bound / sizes.clamp(min=1e-300), 1.0)
