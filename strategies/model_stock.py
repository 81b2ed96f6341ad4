"""Model Stock (arXiv 2403.19522): as far from the base as the hospitals agree.

    t = K c / (1 + (K - 1) c),   c the mean cosine of pairs;   t times the mean

The geometry is that of updates scattered evenly around the one that is sought. For more than two
the paper has one angle for all pairs; their mean stands for it. t is kept within [0, 1]: opposed
updates would have turned the sign. Norms never enter, so small updates are no special case.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from strategies.base import Declaration
from strategies.norms import FromNorms

_ROUNDING = 1e-12  # cosine that rounding may leave of none


class ModelStock(FromNorms):
    """The mean, shortened by how much the updates disagree."""

    name: ClassVar[str] = "model_stock"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 2403.19522", streams=True)

    def directions(self, weights: Tensor) -> Tensor:
        """See ``FromNorms.directions``: their sum."""
        return torch.ones_like(weights)

    def from_norms(self, sizes: Tensor, length: float, weights: Tensor) -> Tensor:
        """See ``FromNorms.from_norms``."""
        k, learned = len(weights), int((sizes > 0).sum())
        if k == 1:
            return weights
        # The square of a sum of unit vectors: how many they are, and twice the cosine of each pair.
        c = (length**2 - learned) / (k * (k - 1))
        t = k * c / (1 + (k - 1) * c) if c > _ROUNDING else 0.0
        return weights * min(t, 1.0)
