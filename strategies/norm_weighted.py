"""Mean direction at the mean norm: every hospital points with its weight, however long its update.

    (sum_k w_k |dW_k|) normalised(sum_k w_k dW_k / |dW_k|)

This is what the library mergekit calls multi-SLERP. Opposed directions that cancel give the mean.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from strategies.base import Declaration
from strategies.inner_products import FromInnerProducts, cosines, norms

_BALANCED = 1e-6


class NormWeighted(FromInnerProducts):
    """Normalised mean of unit directions, times the mean norm."""

    name: ClassVar[str] = "norm_weighted"
    declared: ClassVar = Declaration(space="gram", paper="mergekit multislerp")

    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """See ``FromInnerProducts.coefficients``."""
        size, cosine = norms(products), cosines(products)
        length = float((weights @ cosine @ weights).clamp(min=0).sqrt())
        if length < _BALANCED:
            return weights
        directions = torch.where(size > 0, weights / size.clamp(min=1e-300), 0.0)
        return float(weights @ size) / length * directions
