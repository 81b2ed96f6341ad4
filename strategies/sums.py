"""Weighted sums over hospitals that are added one at a time, in memory that does not grow.

``FactorSums`` holds one B and one A a layer. ``ProductSums`` holds sum_k c_k dW_k: as stacked
factors while these are at most half as large as the dense sum, as the dense (m, n) sum from then on
(whose SVD costs about as much). Nothing is ever cut off: the sum is exact up to float64 rounding.

Weights need not sum to one; means divide by their total.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from adapters.adapter import Adapter, AdapterSpec
from adapters.lowrank import Dense, LowRank, svd, weighted_sum

Update = LowRank | Tensor  # a layer's merged dW: as factors, or dense (m, n) where it has full rank
Updates = dict[str, Update]

_TOGETHER = 64  # columns of factors that are multiplied into a dense sum at once
_CANCELLED = 1e-10  # of a squared norm; of less, float64 inner products know fewer than five digits


class MergeError(ValueError):
    """The adapters cannot be merged by this strategy; the message says why."""


class ProductSum:
    """sum_k c_k dW_k of one layer, float64.

    A factor that all of them share comes out as it went in: the next round trains against it.
    """

    def __init__(self) -> None:
        self._parts: list[LowRank] = []
        self._coefficients: list[float] = []
        self._shares_B = False  # of a single part: others with the same B, another A were added
        self._dense: Tensor | None = None

    def add(self, update: LowRank, c: float) -> None:
        """Add ``c`` times ``update``. One that shares a factor with the last costs no rank."""
        if isinstance(update, Dense):
            self._multiply_out()
            if self._dense is None:
                self._dense = torch.zeros(update.shape, dtype=torch.float64)
            self._dense.add_(update.matrix, alpha=c)
            return
        update = update.to(torch.float64)
        if self._parts and self._joined_last(update, c):
            return
        m, n = update.shape
        room = m * n / (m + n) / 2  # columns of factors
        if self._dense is not None:
            room = min(room, _TOGETHER)
        if self._parts and sum(part.rank for part in self._parts) + update.rank > room:
            self._multiply_out()
        self._parts.append(update)
        self._coefficients.append(c)

    def take(self, factor: float = 1.0) -> Update:
        """``factor`` times the sum. The sum itself is given away: it begins anew."""
        if self._dense is None:
            coefficients = [factor * c for c in self._coefficients]
            if len(self._parts) > 1:
                total = weighted_sum(self._parts, coefficients)
            else:
                (part,), (c,) = self._parts, coefficients
                scaled = (part.B, part.A * c) if self._shares_B else (part.B * c, part.A)
                total = LowRank(*scaled)
            self._clear()
            return total
        self._multiply_out()
        dense, self._dense = self._dense, None
        return dense if factor == 1.0 else dense.mul_(factor)

    def _joined_last(self, update: LowRank, c: float) -> bool:
        """Make one part of the last and this one, where a factor is the same bit for bit."""
        last, own = self._parts[-1], self._coefficients[-1]
        same_A, same_B = update.A.equal(last.A), update.B.equal(last.B)
        if same_A and same_B:
            self._coefficients[-1] = own + c
        elif same_A:
            self._parts[-1] = LowRank(own * last.B + c * update.B, last.A)
            self._coefficients[-1] = 1.0
        elif same_B:
            self._parts[-1] = LowRank(last.B, own * last.A + c * update.A)
            self._coefficients[-1] = 1.0
            self._shares_B = True
        return same_A or same_B

    def _multiply_out(self) -> None:
        if not self._parts:
            return
        total = weighted_sum(self._parts, self._coefficients)
        if self._dense is None:
            self._dense = total.dense()
        else:
            self._dense.addmm_(total.B, total.A)
        self._clear()

    def _clear(self) -> None:
        self._parts, self._coefficients, self._shares_B = [], [], False


class ProductSums:
    """sum_k c_k dW_k of every layer, scales folded in; ranks may differ."""

    def __init__(self) -> None:
        self._layers: dict[str, ProductSum] = {}

    def add(self, adapter: Adapter, c: float | Mapping[str, float]) -> None:
        """Add ``c`` times the adapter's updates; ``c`` may be one number for each layer."""
        for name, layer in adapter.layers.items():
            own = c[name] if isinstance(c, Mapping) else c
            total = self._layers.setdefault(name, ProductSum())
            if isinstance(layer, Dense):
                total.add(layer, own * adapter.spec.scale)
            else:
                # On B, where the merged adapter takes it off again, whichever factor is shared.
                total.add(LowRank(layer.B.double() * adapter.spec.scale, layer.A), own)

    def take(self, factor: float | Mapping[str, float] = 1.0) -> Updates:
        """``factor`` times the sums, by layer. The sums are given away: they begin anew."""
        each = factor if isinstance(factor, Mapping) else dict.fromkeys(self._layers, factor)
        return {name: total.take(each[name]) for name, total in self._layers.items()}


class ProductMeans:
    """Weighted means of the products."""

    def __init__(self) -> None:
        self.count, self._weight = 0, 0.0
        self._sums = ProductSums()

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add one hospital."""
        self._sums.add(adapter, weight)
        self.count, self._weight = self.count + 1, self._weight + weight

    def take(self, factor: float = 1.0) -> Updates:
        """``factor`` times the mean, by layer, given away."""
        return self._sums.take(factor / self._weight)


class FactorSums:
    """Weighted means of B and of A by layer, and whether all hospitals share one of them."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._spec: AdapterSpec | None = None
        self._first: dict[str, LowRank] = {}
        self._sums: dict[str, LowRank] = {}  # of B and of A; their product has no meaning
        self._shared: dict[Literal["A", "B"], set[str]] = {"A": set(), "B": set()}

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add one hospital. Raises MergeError when its rank or scale differs from the others'."""
        spec = self._spec or adapter.spec
        if (adapter.spec.rank, adapter.spec.scale) != (spec.rank, spec.scale):
            raise MergeError(
                "adapters of different rank or scale have no mean of factors; take product_mean or "
                "hetlora"
            )
        for name, layer in adapter.layers.items():
            B, A = weight * layer.B.double(), weight * layer.A.double()
            if self._spec is None:
                self._first[name], self._sums[name] = layer, LowRank(B, A)
                continue
            self._sums[name].B.add_(B)
            self._sums[name].A.add_(A)
        if self._spec is None:
            self._spec = spec
            self._shared = {"A": set(self._first), "B": set(self._first)}
        for factor, names in self._shared.items():
            kept = {
                n
                for n in names
                if getattr(adapter.layers[n], factor).equal(getattr(self._first[n], factor))
            }
            self._shared[factor] = kept
        self._weight += weight

    def shares(self, layer: str) -> bool:
        """Whether all hospitals have the same A, or the same B, in ``layer``."""
        return any(layer in names for names in self._shared.values())

    def mean(self, layer: str) -> LowRank:
        """Mean of B and mean of A of one layer, float64, scaled: what FedAvg on factors gives."""
        assert self._spec is not None, "nothing was added"
        total = self._sums[layer]
        return LowRank(total.B * (self._spec.scale / self._weight), total.A / self._weight)

    def means(self) -> dict[str, LowRank]:
        """``mean`` of every layer."""
        return {name: self.mean(name) for name in self._sums}

    def under_shared(self, factor: Literal["A", "B"]) -> dict[str, LowRank] | None:
        """The exact mean of adapters that share ``factor`` in every layer; None if they do not.

        The shared factor is kept bit for bit: a mean of equal numbers would round.
        """
        if len(self._shared[factor]) < len(self._first):
            return None
        assert self._spec is not None, "nothing was added"
        means = self.means()
        for name, first in self._first.items():
            if factor == "A":
                means[name] = LowRank(means[name].B, first.A.double())
            else:
                A = self._sums[name].A / self._weight
                means[name] = LowRank(first.B.double() * self._spec.scale, A)
        return means


def accumulate(sums: dict[str, Tensor], parts: Mapping[str, Tensor], weight: float = 1.0) -> None:
    """Add ``weight`` times each part to the sum of its name, which the first part begins."""
    for name, part in parts.items():
        own = weight * part
        sums[name] = sums[name] + own if name in sums else own


def norm(update: Update) -> float:
    """Frobenius norm."""
    return update.norm() if isinstance(update, LowRank) else float(update.norm())


def squared_distance(one: Update, size: float, other: LowRank) -> float:
    """Squared Frobenius norm of the difference; ``size`` is that of ``one``.

    Accurate to rounding of ``one``, not of its square: where inner products all but cancel, the
    difference is factorised, which takes longer.
    """
    if not isinstance(one, LowRank):
        return float((one - other.dense()).norm()) ** 2
    squared = size**2 - 2 * one.inner(other) + other.inner(other)
    if squared > _CANCELLED * size**2:
        return squared
    return float(svd(one - other, vectors=0).S.norm()) ** 2
