"""What every merge reports of its hospitals, gathered one hospital at a time.

    discrepancy   ||mean(B) mean(A) - mean(BA)|| / ||mean(BA)||, from the three means
    mean cosine   (||sum_k u_k||^2 - K) / (K (K - 1)),   u_k = dW_k / ||dW_k||

The second is the mean over all pairs without any pair being formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from adapters.adapter import Adapter, AdapterSpec
from strategies.directions import norms
from strategies.sums import (
    FactorSums,
    MergeError,
    ProductMeans,
    ProductSums,
    Update,
    Updates,
    distance,
    norm,
)


class Figures:
    """Figures of one merge: ``add`` every hospital, then ``compare`` every merged layer.

    ``exact``: what is merged is the mean of the products, which then need not be formed twice.
    """

    def __init__(self, exact: bool) -> None:
        self._spec: AdapterSpec | None = None
        self._shapes: dict[str, tuple[int, int]] = {}
        self._factors: FactorSums | None = FactorSums()  # None: ranks or scales differ
        self._products = None if exact else ProductMeans()
        self._means: Updates | None = None
        # Of unit vectors; six digits are enough for a cosine where the sum has become dense.
        self._units, self._learned = ProductSums(torch.float32), 0
        self._squared = self._gap = 0.0

    @classmethod
    def of(cls, adapters: Iterable[Adapter], weights: Iterable[float], exact: bool) -> Figures:
        """With all hospitals added."""
        figures = cls(exact)
        for adapter, weight in zip(adapters, weights, strict=True):
            figures.add(adapter, weight)
        return figures

    def add(self, adapter: Adapter, weight: float) -> None:
        """Check and count one hospital. Raises MergeError when it does not fit the others."""
        shapes = {name: layer.shape for name, layer in adapter.layers.items()}
        if self._spec is None:
            self._spec, self._shapes = adapter.spec, shapes
        if shapes != self._shapes:
            raise MergeError("adapters differ in layers or in the shapes of layers")
        if not adapter.is_finite():
            raise MergeError("an adapter holds NaN or infinity")
        if self._factors is not None:
            try:
                self._factors.add(adapter, weight)
            except MergeError:
                self._factors = None
        if self._products is not None:
            self._products.add(adapter, weight)
        size = math.hypot(*norms(adapter, "layer").values())
        if size > 0:
            self._units.add(adapter, 1 / size)
            self._learned += 1

    @property
    def first(self) -> AdapterSpec:
        """Rank, scale and targets of the first hospital's adapter."""
        assert self._spec is not None, "nothing was added"
        return self._spec

    def compare(self, layer: str, merged: Update) -> None:
        """Take note of one merged layer."""
        mean = merged
        if self._products is not None:
            if self._means is None:
                self._means = self._products.take()
            mean = self._means.pop(layer)
        self._squared += norm(mean) ** 2
        if self._factors is not None and not self._factors.shares(layer):
            self._gap += distance(mean, self._factors.mean(layer)) ** 2

    @property
    def size(self) -> float:
        """Norm of the exact mean."""
        return math.sqrt(self._squared)

    @property
    def discrepancy(self) -> float | None:
        """See ``strategies.merging.Merge``."""
        if self._factors is None:
            return None
        return math.sqrt(self._gap) / self.size if self.size else 0.0

    def take_mean_cosine(self) -> float | None:
        """See ``strategies.merging.Merge``; once, as the sum is given away."""
        k = self._learned
        if k < 2:
            return None
        squared = sum(norm(update) ** 2 for update in self._units.take().values())
        return max(-1.0, min(1.0, (squared - k) / (k * (k - 1))))
