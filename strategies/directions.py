"""Sums of updates and of their directions dW_k / |dW_k|, one hospital at a time.

The norm of sum_k v_k dW_k / |dW_k| is all that is needed of the cosines of all pairs: its square is
sum_jk v_j v_k cos_jk. An update that is zero has no direction.
"""

from __future__ import annotations

import math
from typing import Literal

from adapters.adapter import Adapter
from strategies.sums import ProductSums, Updates, norm

Scope = Literal["layer", "model"]  # what counts as one vector


class Directions:
    """Per layer: the weighted mean, the sum of directions, and the mean norm.

    ``weighted``: directions count with their hospital's weight; else each counts once.
    """

    def __init__(self, scope: Scope, weighted: bool) -> None:
        self.scope, self.weighted = scope, weighted
        self.count, self.weight = 0, 0.0
        self.learned: dict[str, int] = {}  # hospitals that have a direction
        self._means, self._units = ProductSums(), ProductSums()
        self._lengths: dict[str, float] = {}

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add one hospital."""
        size = norms(adapter, self.scope)
        each = weight if self.weighted else 1.0
        self._means.add(adapter, weight)
        self._units.add(adapter, {n: each / s if s else 0.0 for n, s in size.items()})
        for name, s in size.items():
            self._lengths[name] = self._lengths.get(name, 0.0) + weight * s
            self.learned[name] = self.learned.get(name, 0) + (s > 0)
        self.count, self.weight = self.count + 1, self.weight + weight

    def mean_norm(self, layer: str) -> float:
        """sum_k w_k |dW_k|."""
        return self._lengths[layer] / self.weight

    def take_means(self) -> Updates:
        """sum_k w_k dW_k, given away."""
        return self._means.take(1 / self.weight)

    def take_directions(self) -> tuple[Updates, dict[str, float]]:
        """The sums of directions, given away, and their norms within the scope."""
        found = self._units.take()
        return found, within(self.scope, {name: norm(update) for name, update in found.items()})


def norms(adapter: Adapter, scope: Scope) -> dict[str, float]:
    """|dW| by layer; with scope "model" that of all layers together, for each of them."""
    scale = abs(adapter.spec.scale)
    return within(scope, {name: scale * layer.norm() for name, layer in adapter.layers.items()})


def within(scope: Scope, sizes: dict[str, float]) -> dict[str, float]:
    """Norms by layer as they are, or the norm of all of them for each."""
    if scope == "layer":
        return sizes
    return dict.fromkeys(sizes, math.hypot(*sizes.values()))
