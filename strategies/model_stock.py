"""Model Stock (arXiv 2403.19522): as far from the base as the hospitals agree.

    t = K c / (1 + (K - 1) c),   c the mean cosine of pairs;   t times the mean

The geometry is that of updates scattered evenly around the one that is sought. For more than two
the paper has one angle for all pairs; their mean stands for it. t is kept within [0, 1]: opposed
updates would have turned the sign. Norms never enter, so small updates are no special case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update
from strategies.norms import Scope, combination, inverse, lengths, norms_of


class ModelStock(Strategy):
    """The mean, shortened by how much the updates disagree."""

    name: ClassVar[str] = "model_stock"
    declared: ClassVar = Declaration(space="gram", paper="arXiv 2403.19522", streams=True)
    scope: Scope = "layer"  # what counts as one vector

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        w, k = torch.tensor(list(weights), dtype=torch.float64), len(weights)
        sizes = norms_of(adapters, self.scope)
        shares = dict.fromkeys(sizes, 1.0)
        if k > 1:
            units = combination(adapters, {name: inverse(size) for name, size in sizes.items()})
            for name, length in lengths(units, self.scope).items():
                # The square of a sum of unit vectors is how many there are, and twice every pair.
                c = (length**2 - int((sizes[name] > 0).sum())) / (k * (k - 1))
                shares[name] = min(k * c / (1 + (k - 1) * c), 1.0) if c > 0 else 0.0
        return combination(adapters, {name: share * w for name, share in shares.items()})
