"""Model Stock (arXiv 2403.19522): as far from the base as the hospitals agree.

    t = K c / (1 + (K - 1) c),   c the mean cosine of pairs;   t times the mean

The geometry is that of updates scattered evenly around the one that is sought. For more than two
the paper has one angle for all pairs; their mean stands for it. t is kept within [0, 1]: opposed
updates would have turned the sign. Norms never enter, so small updates are no special case.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from strategies.base import Declaration
from strategies.inner_products import FromInnerProducts, cosines


class ModelStock(FromInnerProducts):
    """The mean, shortened by how much the updates disagree."""

    name: ClassVar[str] = "model_stock"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 2403.19522")

    def coefficients(self, products: Tensor, weights: Tensor) -> Tensor:
        """See ``FromInnerProducts.coefficients``."""
        k = len(weights)
        if k == 1:
            return weights
        cosine = cosines(products)
        c = float((cosine.sum() - cosine.diagonal().sum()) / (k * (k - 1)))
        t = k * c / (1 + (k - 1) * c) if c > 0 else 0.0
        return weights * min(t, 1.0)
