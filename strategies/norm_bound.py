"""Norm bounding (Sun et al., arXiv 1911.07963): no hospital's update counts for more than a bound.

The bound is a multiple of the median norm, so that it needs no knowledge of scale; hospitals that
learned nothing have no say in it. What is longer is shortened to it; then the mean is taken. One
hospital that lies moves the mean by a bounded step, from three on.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from strategies.base import Declaration
from strategies.inner_products import FromInnerProducts, norms


class NormBound(FromInnerProducts):
    """Mean of updates that are no longer than a multiple of the median norm."""

    name: ClassVar[str] = "norm_bound"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 1911.07963")
    multiple: Annotated[float, Field(ge=1, le=100)] = 1.0  # of the median norm

    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """See ``FromInnerProducts.coefficients``."""
        size = norms(products)
        if not size.any():
            return weights
        bound = self.multiple * size[size > 0].quantile(0.5)  # of two, their mean
        return weights * torch.where(size > bound, bound / size.clamp(min=1e-300), 1.0)
