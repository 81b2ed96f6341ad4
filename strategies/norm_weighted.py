"""Mean direction at the mean norm: every hospital points with its weight, however long its update.

    (sum_k w_k |dW_k|) normalised(sum_k w_k dW_k / |dW_k|)

This is what the library mergekit calls multi-SLERP. Opposed directions that cancel give the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from adapters.adapter import Adapter
from strategies.base import Declaration, Draw, Strategy, Update
from strategies.norms import Scope, combination, inverse, lengths, norms_of

_BALANCED = 1e-6  # length of a mean of unit vectors that cancel


class NormWeighted(Strategy):
    """Normalised mean of unit directions, times the mean norm."""

    name: ClassVar[str] = "norm_weighted"
    declared: ClassVar = Declaration(space="gram", paper="mergekit multislerp", streams=True)
    scope: Scope = "layer"  # what counts as one vector

    def combine(
        self, adapters: Sequence[Adapter], weights: Sequence[float], draw: Draw
    ) -> Mapping[str, Update]:
        """See ``Strategy.combine``."""
        w = torch.tensor(list(weights), dtype=torch.float64)
        sizes = norms_of(adapters, self.scope)
        merged = combination(adapters, {name: w * inverse(size) for name, size in sizes.items()})
        found = lengths(merged, self.scope)
        balanced = [name for name, length in found.items() if length < _BALANCED]
        means = combination(adapters, dict.fromkeys(sizes, w)) if balanced else {}
        for name, size in sizes.items():
            if name in balanced:
                merged[name] = means[name]
            else:
                merged[name] = merged[name] * (float(w @ size) / found[name])
        return merged
