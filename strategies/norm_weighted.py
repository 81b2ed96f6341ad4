"""Mean direction at the mean norm: every hospital points with its weight, however long its update.

    (sum_k w_k |dW_k|) normalised(sum_k w_k dW_k / |dW_k|)

This is what the library mergekit calls multi-SLERP. Opposed directions that cancel give the mean.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from strategies.base import Declaration
from strategies.norms import FromNorms

_BALANCED = 1e-6  # length of a mean of unit vectors that cancel


class NormWeighted(FromNorms):
    """Normalised mean of unit directions, times the mean norm."""

    name: ClassVar[str] = "norm_weighted"
    declared: ClassVar = Declaration(space="gram", paper="mergekit multislerp", streams=True)

    def directions(self, weights: Tensor) -> Tensor:
        """See ``FromNorms.directions``: their weighted mean."""
        return weights

    def from_norms(self, sizes: Tensor, length: float, weights: Tensor) -> Tensor:
        """See ``FromNorms.from_norms``."""
        if length < _BALANCED:
            return weights
        directions = torch.where(sizes > 0, weights / sizes.clamp(min=1e-300), 0.0)
        return float(weights @ sizes) / length * directions
