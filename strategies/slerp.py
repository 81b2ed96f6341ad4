"""SLERP (Shoemake 1985) between two updates: along the arc, so that norms do not shrink between.

    c = (sin((1 - t) theta), sin(t theta)) / sin(theta),   t the second one's weight

Nearly parallel or opposed updates, or a zero one, are interpolated along the line. More than two
hospitals have no order in which to chain; ``karcher`` is the same idea for many.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from strategies.base import Declaration, MergeError
from strategies.inner_products import PARALLEL, FromInnerProducts, cosines


class Slerp(FromInnerProducts):
    """Spherical interpolation of two updates at the second one's weight."""

    name: ClassVar[str] = "slerp"
    declared: ClassVar = Declaration(space="gram", paper="Shoemake 1985")

    def require_count(self, count: int) -> None:
        """See ``Strategy.require_count``."""
        if count > 2:
            raise MergeError("slerp merges two; use karcher for more")

    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """See ``FromInnerProducts.coefficients``. Raises MergeError for more than two."""
        self.require_count(len(weights))
        if len(weights) == 1:
            return weights
        cosine = cosines(products)[0, 1]
        if abs(cosine) > PARALLEL or not products.diagonal().all():
            return weights
        theta = torch.arccos(cosine)
        return torch.sin(weights * theta) / torch.sin(theta)
