"""What every merge reports of its hospitals, gathered one hospital at a time.

    discrepancy   ||mean(B) mean(A) - mean(BA)|| / ||mean(BA)||, from the three means
    mean cosine   (||sum_k u_k||^2 - K) / (K (K - 1)),   u_k = dW_k / ||dW_k||

The second is the mean over all pairs without any pair being formed. In a round dW_k - dW_0 takes
the place of dW_k in it, and the mean of these is what the first is relative to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from adapters.adapter import Adapter, AdapterSpec
from strategies.changes import Changes
from strategies.sums import FactorSums, MergeError, ProductSums, Update, norm, squared_distance

_ROUNDING = 1e-12  # of a norm


class Figures:
    """Figures of one merge: from its hospitals, then from the exact mean of each layer."""

    def __init__(
        self, adapters: Iterable[Adapter], weights: Iterable[float], changes: Changes | None = None
    ) -> None:
        """Check and count all hospitals. Raises MergeError when they do not fit each other."""
        self._factors: FactorSums | None = FactorSums()  # None: ranks or scales differ
        self._squared = self._whole = self._gap = 0.0
        units, count, learned = ProductSums(), 0, 0
        spec, shapes = None, {}
        for adapter, weight in zip(adapters, weights, strict=True):
            own = {name: layer.shape for name, layer in adapter.layers.items()}
            if spec is None:
                spec, shapes = adapter.spec, own
            if own != shapes:
                raise MergeError(
                    f"adapters differ in layers or in the shapes of layers: number {count} and "
                    "number 0"
                )
            if not adapter.is_finite():
                raise MergeError(f"adapter number {count} holds NaN or infinity")
            self._add_factors(adapter, weight)
            learned += _add_direction(units, adapter if changes is None else changes.of(adapter))
            count += 1  # noqa: SIM113  # enumerate would hold on to an adapter
        if spec is None:
            raise MergeError("no adapter to merge")
        self.first: AdapterSpec = spec
        self.shapes: Mapping[str, tuple[int, int]] = shapes
        self.mean_cosine = _mean_cosine(units, learned)

    def compare(self, layer: str, mean: Update, size: float, moved: float) -> None:
        """Take note of the exact mean of one layer, of norm ``size``, and how far it has moved."""
        self._squared += moved**2
        self._whole += size**2
        if self._factors is not None and not self._factors.shares(layer):
            self._gap += squared_distance(mean, size, self._factors.mean(layer))

    @property
    def size(self) -> float:
        """Norm of the exact mean, in a round of how far it has moved; 0 where that is rounding."""
        return math.sqrt(self._squared) if self._squared > _ROUNDING**2 * self._whole else 0.0

    @property
    def discrepancy(self) -> float | None:
        """See ``strategies.merging.Merge``."""
        if self._factors is None:
            return None
        return math.sqrt(self._gap) / self.size if self.size else 0.0

    def _add_factors(self, adapter: Adapter, weight: float) -> None:
        if self._factors is not None:
            try:
                self._factors.add(adapter, weight)
            except MergeError:
                self._factors = None


def _add_direction(units: ProductSums, update: Adapter) -> bool:
    """Add ``update`` at length 1, if it has a length."""
    norms = [layer.norm() for layer in update.layers.values()]
    size = math.hypot(*norms) * abs(update.spec.scale)
    if size > 0:
        units.add(update, 1 / size)
    return size > 0


def _mean_cosine(units: ProductSums, count: int) -> float | None:
    """From the sum of ``count`` unit vectors, each of which is a hospital's whole adapter."""
    if count < 2:
        return None
    squared = sum(norm(update) ** 2 for update in units.take().values())
    return max(-1.0, min(1.0, (squared - count) / (count * (count - 1))))
